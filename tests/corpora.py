"""Small texts for tests, and examples read back into what they are made of."""

import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from sleepnet.tasks import TextConfig

_VOCABULARY = [
    "sleep",
    "wake",
    "dream",
    "night",
    "naïve",
    "café",
    "日",
    "window",
    "and",
    "of",
    "\n",
]


def documents(seed: int, lengths: Sequence[int]) -> list[str]:
    """Documents of so many words; 0 is an empty one."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(_VOCABULARY, length).tolist()) for length in lengths]


def write_jsonl(path: pathlib.Path, texts: Sequence[str], field: str = "text") -> str:
    """One object a line; the path, for a config."""
    lines = [json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines))
    return str(path)


def write_records(path: pathlib.Path, texts: Sequence[str]) -> str:
    """One object a record; the path, for a config."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    return str(path)


def write_letters(path: pathlib.Path, letters: str) -> str:
    """A tokenizer that knows these letters, and drops all others."""
    import tokenizers

    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[])).save(str(path))
    return str(path)


def write_tokenizer(path, special: Sequence[str] = ()):
    """A small byte-pair tokenizer, learnt on the words of the corpus, that asks for truncation."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents(0, [50] * 20), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return str(path)


_WORDS = [3, 0, 40, 1, 7, 12, 90, 2, 2, 25, 1, 5, 18, 8, 33, 1]
# Documents of none, few and many windows.
TEXTS = {"train": documents(0, 2 * _WORDS), "test": documents(1, _WORDS)}


def text_config(folder: pathlib.Path, **changes) -> TextConfig:
    """Of TEXTS, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"{split}_files": (write_jsonl(folder / f"{split}.jsonl", texts),)
        for split, texts in TEXTS.items()
    }
    return TextConfig(**({"window": 16, "windows": 4} | files | changes))


def cut(documents: Iterable[Sequence[int]], end: int, size: int) -> list[tuple[list, list]]:
    """(tokens, targets) of every piece of at most `size` tokens."""
    pieces = []
    for ids in map(list, documents):
        for start in range(0, len(ids), size):
            stop = start + size
            pieces.append((ids[start:stop], [*ids, end][start + 1 : stop + 1]))
    return pieces


def read_back(example) -> list[tuple[list, list]]:
    """(tokens, targets) of each piece of an example, by nothing but its arrays."""
    starts = np.flatnonzero(example.reset_W).tolist()
    pieces = []
    for first, stop in itertools.pairwise([*starts, len(example.reset_W)]):
        tokens, targets = [], []
        for w in range(first, stop):
            length = example.length_W[w]
            tokens += example.tokens_WL[w, :length].tolist()
            targets += example.targets_WL[w, :length].tolist()
        pieces.append((tokens, targets))
    return pieces
