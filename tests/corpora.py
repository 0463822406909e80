"""Small texts for tests: words drawn from a seed, in files of either kind."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from sleepnet.config import TextConfig

WORDS = ["sleep", "wake", "dream", "night", "naïve", "café", "日", "window", "and", "of", "\n"]


def documents(seed: int, lengths: Sequence[int]) -> list[str]:
    """Documents of so many words; 0 is an empty one."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length).tolist()) for length in lengths]


def write_jsonl(path: pathlib.Path, texts: Sequence[str], field: str = "text") -> str:
    """One object a line; the path, for a config."""
    lines = [json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines))
    return str(path)


def text_config(folder: pathlib.Path, **changes) -> TextConfig:
    """Documents of none, few and many windows in both splits."""
    lengths = [3, 0, 40, 1, 7, 12, 90, 2, 2, 25, 1, 5, 18, 8, 33, 1]
    train = write_jsonl(folder / "train.jsonl", documents(0, 2 * lengths))
    test = write_jsonl(folder / "test.jsonl", documents(1, lengths))
    given = dict(train_files=(train,), test_files=(test,), window=16, windows=4)
    return TextConfig(**(given | changes))
