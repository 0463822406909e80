"""Text: documents packed into windows, every token predicted from those before it."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import numpy as np

from sleepnet.config import checks
from sleepnet.config.checks import FOLLOWS, MAX_SEED, ConfigError
from sleepnet.integers import as_integer
from sleepnet.tasks.base import Task
from sleepnet.tasks.corpus import Corpus, check_held_out, open_corpus
from sleepnet.tasks.layout import Example
from sleepnet.tasks.packing import Packing, Piece
from sleepnet.tasks.splits import SPLITS, as_index, check_split
from sleepnet.tokenizer import (
    BYTES,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    special_tokens_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text: documents over several windows, every token predicted from those before it.

    A document begins at a window's start, from a fresh state; one of more than `windows` windows is
    cut, and each piece begins from a fresh state. Every window is scored, and every window sleeps.

    Files are .jsonl, an object a line, or .array_record: of such objects, or of tokens as
    `launch.tokenize` writes them. A path that exists is taken as it stands, and any other as a
    pattern. A file may not be named twice; a copy of it may, and counts its text twice. A file of
    test text that is trained on is refused, also as a copy or as tokens; documents that stand in
    different files of both are not looked for.
    """

    name: str = "text"
    train_files: tuple[str, ...] = ()  # paths or patterns
    test_files: tuple[str, ...] = ()  # held out
    text_field: str = "text"  # of the objects
    tokenizer: str = "bytes"  # or the path of a JSON file of the tokenizers package
    # How special tokens are read that stand written in documents and prompts: as "text", like any
    # other; or as "control", the special tokens themselves.
    special_tokens: str = "text"
    window: int = 64
    windows: int = 8  # of each example, W
    seed: int = 0  # of the order
    # What was read, as "name: content": the tokenizer, then file by file; None: as it is found. A
    # run goes on only with the same content, wherever it now lies.
    fingerprints: tuple[str, ...] = FOLLOWS

    def __post_init__(self):
        checks.normalize(self)
        checks.paths(self, "train_files", "test_files", "tokenizer")
        checks.one_of(self, "name", ("text",))
        checks.one_of(self, "special_tokens", SPECIAL_TOKENS)
        checks.positive(self, "window", "windows")
        checks.in_range(self, "seed", 0, MAX_SEED)
        for path in sorted({*self.train_files} & {*self.test_files}):
            raise ConfigError(f"test_files: {path!r} is in train_files too, so it is not held out")


def contents(fingerprints: Iterable[str]) -> tuple[str, ...]:
    """The contents that `TextConfig.fingerprints` tell of, without the names of the files."""
    return tuple(fingerprint.rpartition(": ")[2] for fingerprint in fingerprints)


def task_tokenizer(config: TextConfig) -> Tokenizer:
    """Load the tokenizer of a task of text.

    Raises:
      ConfigError: as `load_tokenizer`; or `config.fingerprints` tells of another tokenizer.
    """
    known = load_tokenizer(config.tokenizer, "task.tokenizer", config.special_tokens)
    if config.fingerprints and known.identity != (before := contents(config.fingerprints)[0]):
        if apart := special_tokens_of(before, known.identity):
            raise ConfigError(
                f"task.special_tokens={apart[1]!r}, and this run was made with {apart[0]!r}; set "
                f"task.special_tokens={apart[0]}, or begin another run"
            )
        raise ConfigError(
            f"task.tokenizer: {config.tokenizer} is {known.identity}, and this run was made with "
            f"{before}; name that one, or begin another run"
        )
    return known


class Text(Task):
    """Predict each next token of a document, and its end.

    Tokens: the tokenizer's, then one that ends a document; it is only ever predicted, never read.

    Every valid position is scored, at the token that follows in the document: at the last position
    of a window the first of the next, by logits of before the sleep. The first token of a document
    has no prediction. Rows of W windows are packed anew in each epoch (`Packing`); an index beyond
    the first epoch is of a later one.

    The depth of a position is the number of its window within the piece of its document, from 1:
    at depth d the model has slept on the d - 1 windows before.
    """

    depth_name = "windows"
    config: TextConfig

    def __init__(self, config: TextConfig):
        """Opens the files.

        Raises:
          ConfigError: files or a tokenizer that cannot be used, or not those that
            `config.fingerprints` tells of; test text that is trained on.
        """
        self._tokenizer = task_tokenizer(config)
        self._end = self._tokenizer.vocab_size
        self._corpora = {
            split: open_corpus(f"{split}_files", files, config.text_field, self._tokenizer)
            for split, files in zip(SPLITS, (config.train_files, config.test_files), strict=True)
        }
        check_held_out(self._corpora["train"].sources, self._corpora["test"].sources)
        self._packings = {
            split: Packing(
                corpus.lengths_D, config.window, config.windows, f"{config.seed} {split}".encode()
            )
            for split, corpus in self._corpora.items()
        }
        known = _from_anywhere(config, self._tokenizer.identity, self._corpora)
        _check_fingerprints(config.fingerprints, known.fingerprints)
        super().__init__(known, self._tokenizer.vocab_size + 1)

    @property
    def num_windows(self) -> int:
        """See `Task.num_windows`."""
        return self.config.windows

    @property
    def scored_per_window(self) -> tuple[int, ...]:
        """See `Task.scored_per_window`: all."""
        return (self.config.window,) * self.config.windows

    def window_passes(self, passes: int) -> tuple[int, ...]:
        """Every window sleeps but the last, behind which nothing is read."""
        passes = as_integer("passes", passes, 1)
        return (passes,) * (self.config.windows - 1) + (1,)

    @property
    def depths(self) -> tuple[int, ...]:
        """Up to the longest piece of the test split."""
        return tuple(range(1, self._packings["test"].longest + 1))

    def packing(self, split: str) -> Packing:
        """How the documents of a split become rows: `rows` of an epoch, and how full they are."""
        check_split(split)
        return self._packings[split]

    def predicted_per_byte(self, split: str) -> float:
        """Predictions made over the whole split, ends included, per byte of its text in UTF-8."""
        check_split(split)
        corpus = self._corpora[split]
        return float(corpus.lengths_D.sum()) / corpus.text_bytes

    def num_distinct(self, split: str, wanted: int) -> int:
        """See `Task.num_distinct`: at most the rows of one epoch, which later ones repeat."""
        return min(wanted, self.packing(split).rows)

    def lost_bytes(self, split: str) -> int | None:
        """Bytes of the text of a split that its tokens do not determine; None: not known.

        See `Tokenizer.lost_bytes`; files of tokens from before they were counted do not tell.
        """
        check_split(split)
        return self._corpora[split].lost_bytes

    def example(self, split: str, index: int) -> Example:
        """See `Task.example`."""
        pieces = self.packing(split).row(as_index(index))
        return _example(self._corpora[split], pieces, self.config, self._end)

    def token_name(self, token: int) -> str:
        """The tokenizer's name, or "<end of document>"."""
        self._check_token(token)
        if token == self._end:
            return "<end of document>"
        return self._tokenizer.token_name(token)


def _example(corpus: Corpus, pieces: list[Piece], config: TextConfig, end: int) -> Example:
    """Pieces one after another, each from a window's start."""
    W, L = config.windows, config.window
    tokens, targets, depth = np.zeros((3, W * L), np.int32)
    length_W, reset_W = np.zeros(W, np.int32), np.zeros(W, bool)
    w = 0
    for piece in pieces:
        places = slice(w * L, w * L + piece.length)
        ids = corpus.read(piece.start, piece.start + piece.length + (not piece.ends))
        tokens[places] = ids[: piece.length]
        targets[places] = np.append(ids[1:], end) if piece.ends else ids[1:]
        depth[places] = 1 + np.arange(piece.length) // L
        length_W[w : w + piece.windows] = L
        length_W[w + piece.windows - 1] = piece.length - (piece.windows - 1) * L
        reset_W[w] = True
        w += piece.windows
    mask = depth > 0
    answer = np.where(mask, np.cumsum(mask) - 1, -1).astype(np.int32)
    tokens_WL, targets_WL, mask_WL, depth_WL, answer_WL = (
        array.reshape(W, L) for array in (tokens, targets, mask, depth, answer)
    )
    return Example(tokens_WL, length_W, targets_WL, mask_WL, depth_WL, answer_WL, reset_W)


def _from_anywhere(config: TextConfig, identity: str, corpora: dict[str, Corpus]) -> TextConfig:
    """The config with the absolute path of every file, and with what was read."""

    def files(split: str) -> tuple[str, ...]:
        return tuple(str(source.path.absolute()) for source in corpora[split].sources)

    tokenizer = fingerprint = config.tokenizer
    if tokenizer != BYTES:
        tokenizer = str(pathlib.Path(tokenizer).absolute())
        fingerprint = f"{tokenizer}: {identity}"
    of_files = (line for split in SPLITS for line in corpora[split].fingerprints)
    return dataclasses.replace(
        config, tokenizer=tokenizer, train_files=files("train"), test_files=files("test"),
        fingerprints=(fingerprint, *of_files),
    )  # fmt: skip


def _check_fingerprints(expected: tuple[str, ...] | None, found: tuple[str, ...]):
    """The names may differ: files may have moved."""
    if expected is None or contents(expected) == contents(found):
        return
    pairs = itertools.zip_longest(expected, found, fillvalue="no further file")
    was, now = next((a, b) for a, b in pairs if contents([a]) != contents([b]))
    raise ConfigError(
        f"the text is not what this run was made with; it had {was}, and there is {now}; put it "
        f"back, or begin another run"
    )
