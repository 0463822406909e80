"""The documents of some files as one stream of token ids, any part of which can be read.

Text is tokenised in memory when its file is opened; files of tokens (`records`) are read from
where they lie.
"""

import bisect
import dataclasses
import difflib
import functools
import glob
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from sleepnet.config import ConfigError, nearest
from sleepnet.tasks import records
from sleepnet.tokenizer import Tokenizer

SUFFIXES = (".jsonl", records.SUFFIX)
MOST_TEXT_BYTES = 2**28  # of a file that is tokenised in memory, at every start
_ENCODED_AT_ONCE = 1024  # documents


@dataclasses.dataclass(frozen=True)
class _TokensInMemory:
    lengths_D: np.ndarray
    tokens: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One file: its tokens, the bytes of its text, and what tells it from any other file."""

    tokens: _TokensInMemory | records.TokenFile
    text_bytes: int
    fingerprint: str


class Corpus:
    """Documents, numbered over all files, written one after another into a stream.

    Attributes:
      lengths_D: tokens of each document that is not empty.
      text_bytes: of all text, in UTF-8.
      fingerprints: of each file: its path, its size and a digest.
    """

    def __init__(self, parts: Sequence[_Part]):
        self._parts = parts
        self.lengths_D = np.concatenate([part.tokens.lengths_D for part in parts])
        self.text_bytes = sum(part.text_bytes for part in parts)
        self.fingerprints = tuple(part.fingerprint for part in parts)
        sizes = [int(part.tokens.lengths_D.sum()) for part in parts]
        self._ends = list(itertools.accumulate(sizes))
        self._starts = [0, *self._ends[:-1]]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop - 1 of the stream, of one document."""
        part = bisect.bisect_right(self._ends, start)
        skipped = self._starts[part]
        return self._parts[part].tokens.read(start - skipped, stop - skipped)


def open_corpus(what: str, patterns: Sequence[str], text_field: str, tokenizer: Tokenizer):
    """The corpus of all files that match.

    Args:
      what: the field of the config that names them, for errors.
      patterns: paths or globs.
      text_field: of the JSON objects that hold text.
      tokenizer: of text; files of tokens must be of the same.

    Raises:
      ConfigError: a file that is missing, damaged or not what it should be, or nothing in any.
    """
    parts = []
    for path in find_files(what, patterns):
        stat = path.stat()
        changed = (stat.st_size, stat.st_mtime_ns)
        try:
            parts.append(_open(path, changed, text_field, tokenizer))
        except ConfigError as error:
            raise ConfigError(f"task.{what}: {error}") from None
    corpus = Corpus(parts)
    if not len(corpus.lengths_D):
        raise ConfigError(f"task.{what}: there is no text in {', '.join(patterns)}")
    return corpus


def find_files(what: str, patterns: Sequence[str]) -> list[pathlib.Path]:
    """Files in the order of the patterns, those of a glob by name.

    Raises:
      ConfigError: nothing matches, a file that matches twice, or one of another kind.
    """
    found: dict[pathlib.Path, str] = {}
    for pattern in patterns:
        paths = [pathlib.Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        if not paths:
            raise ConfigError(f"task.{what}: no file matches {pattern!r}{_hint(pattern)}")
        for path in paths:
            if path.suffix not in SUFFIXES:
                raise ConfigError(
                    f"task.{what}: {path} is of an unknown kind; allowed: {', '.join(SUFFIXES)}; "
                    f"the nearest is {nearest(path.suffix, SUFFIXES)}"
                )
            if path in found:
                raise ConfigError(
                    f"task.{what}: {path} is named twice, by {found[path]!r} and {pattern!r}"
                )
            found[path] = pattern
    if not found:
        raise ConfigError(f"task.{what} names no file; give one or more {' or '.join(SUFFIXES)}")
    return list(found)


def tokenize(
    paths: Sequence[pathlib.Path], out: pathlib.Path, text_field: str, tokenizer: Tokenizer
) -> records.Index:
    """Writes the documents of files of text into one file of tokens; what it tells of itself.

    Raises:
      ConfigError: a file that holds no text, or a line, which it names.
    """
    for path in paths:
        if path.suffix == records.SUFFIX and records.holds_tokens(path):
            raise ConfigError(f"{path} is a file of tokens already")
    every = (_encode_documents(path, text_field, tokenizer) for path in paths)
    documents = itertools.chain.from_iterable(every)
    return records.write_tokens(out, documents, tokenizer=tokenizer.identity, dtype=tokenizer.dtype)


@functools.lru_cache(maxsize=16)  # evaluation makes the same task for each N
def _open(path: pathlib.Path, changed, text_field: str, tokenizer: Tokenizer) -> _Part:
    """`changed` is what a file that was written anew does not share with the old one."""
    size, _ = changed
    if path.suffix == records.SUFFIX and records.holds_tokens(path):
        file = records.TokenFile(path)
        if file.index.tokenizer != tokenizer.identity:
            raise ConfigError(
                f"{path} was tokenised by {file.index.tokenizer}, and task.tokenizer is "
                f"{tokenizer.identity}"
            )
        return _Part(file, file.index.text_bytes, _fingerprint(path, size, file.index.digest))
    if size > MOST_TEXT_BYTES:
        raise ConfigError(
            f"{path} has {size / 2**20:.0f} MiB of text, and at most {MOST_TEXT_BYTES / 2**20:.0f} "
            f"are tokenised at every start: once and for all it is done by python -m "
            f"launch.tokenize --config=.. --out=.."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    lengths, documents, text_bytes = [], [np.zeros(0, tokenizer.dtype)], 0
    for ids, size_of_text in _encode_documents(path, text_field, tokenizer):
        lengths.append(len(ids))
        documents.append(ids.astype(tokenizer.dtype))
        text_bytes += size_of_text
    tokens = _TokensInMemory(np.array(lengths, np.int64), np.concatenate(documents))
    return _Part(tokens, text_bytes, _fingerprint(path, size, digest))


def _encode_documents(
    path: pathlib.Path, text_field: str, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of each document and the bytes of its text; empty ones are left out."""
    texts = _texts(path, text_field)
    while chunk := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        try:
            encoded = tokenizer.encode([text for text, _ in chunk])
        except Exception as error:  # the tokenizers package raises bare Exceptions
            raise ConfigError(f"{path} cannot be tokenised: {error}") from None
        for ids, (_, size) in zip(encoded, chunk, strict=True):
            if len(ids):
                yield ids, size


def _fingerprint(path: pathlib.Path, size: int, digest: str) -> str:
    return f"{path}: {size} bytes, sha256 {digest}"


def _texts(path: pathlib.Path, text_field: str) -> Iterator[tuple[str, int]]:
    """The text of each document, and its bytes."""
    for place, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, {place}, is no JSON: {error}") from None
        if not isinstance(row, dict) or text_field not in row:
            raise ConfigError(f"{path}, {place}: {_no_field(row, text_field)}")
        text = row[text_field]
        if not isinstance(text, str):
            raise ConfigError(f"{path}, {place}: {text_field!r} is no text, but {text!r:.40}")
        try:
            yield text, len(text.encode())
        except UnicodeEncodeError as error:
            raise ConfigError(f"{path}, {place}: {text_field!r} is no Unicode: {error}") from None


def _lines(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == records.SUFFIX:
        for number, record in enumerate(records.open_records(path)):
            yield f"record {number}", record
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line


def _no_field(row, text_field: str) -> str:
    if not isinstance(row, dict) or not row:
        return f"it must be a JSON object with the field {text_field!r}"
    return (
        f"it has no field {text_field!r}, but {', '.join(row)}; set task.text_field; the nearest "
        f"is {nearest(text_field, row)!r}"
    )


def _hint(pattern: str) -> str:
    folder = pathlib.Path(pattern).parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    names = [str(path) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else f": {folder} has none of {SUFFIXES}"
