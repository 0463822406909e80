"""The documents of some files as one stream of token ids, any part of which can be read.

Text is tokenised in memory when its file is opened; files of tokens (`records`) are read from
where they lie.
"""

import bisect
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sleepnet.config import ConfigError
from sleepnet.config.checks import nearest
from sleepnet.input_files import regular_status
from sleepnet.tasks import records
from sleepnet.tasks.records import Document
from sleepnet.tasks.text_files import find_files
from sleepnet.tokenizer import BYTES, Tokenizer

MOST_TEXT_BYTES = 2**28  # of a file that is tokenised in memory, at every start
_ENCODED_AT_ONCE = 1024  # documents
_NOTHING = hashlib.sha256().hexdigest()  # of a file without text, which any two may be


class Source(NamedTuple):
    """A file, and digests that it shares with every file that holds the same text.

    They are of its bytes, of its tokens and, of a file of tokens, of the files it was made from.
    """

    path: pathlib.Path
    digests: frozenset[str]


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
    lost_bytes: int | None
    fingerprint: str
    source: Source


class Corpus:
    """Documents, numbered over all files, written one after another into a stream.

    Attributes:
      lengths_D: tokens of each document that is not empty.
      text_bytes: of all text, in UTF-8.
      lost_bytes: those of them that the tokens do not determine; None: not known.
      sources: the files.
      fingerprints: of each file: its absolute path, its size and a digest.
    """

    def __init__(self, parts: Sequence[_Part]):
        self._parts = parts
        self.lengths_D = np.concatenate([part.tokens.lengths_D for part in parts])
        self.text_bytes = sum(part.text_bytes for part in parts)
        lost = [part.lost_bytes for part in parts if part.lost_bytes is not None]
        self.lost_bytes = sum(lost) if len(lost) == len(parts) else None
        self.sources = tuple(part.source for part in parts)
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
      patterns: see `find_files`.
      text_field: of the JSON objects that hold text.
      tokenizer: of text; files of tokens must be of the same.

    Raises:
      ConfigError: a file that is missing, damaged or not what it should be, or nothing in any.
    """
    with _errors_of(what):
        paths = find_files(patterns)
        corpus = Corpus([_open(path, _stamp(path), text_field, tokenizer) for path in paths])
        if not len(corpus.lengths_D):
            raise ConfigError(f"there is no text in {', '.join(patterns)}")
    return corpus


def check_held_out(train: Iterable[Source], test: Iterable[Source]):
    """Checks that no file of test text is trained on, under whatever name.

    Raises:
      ConfigError: one that is, with both names.
    """
    trained_on = {digest: path for path, digests in train for digest in digests}
    for path, digests in test:
        for digest in (digests & trained_on.keys()) - {_NOTHING}:
            raise ConfigError(
                f"task.test_files: {path} holds text of {trained_on[digest]}, which is in "
                f"task.train_files, so it is not held out; leave it out of one of the two"
            )


def tokenize(
    what: str, sources: Sequence[Source], out: pathlib.Path, text_field: str, tokenizer: Tokenizer
) -> records.Index:
    """Writes the documents of files of text into one file of tokens; what it tells of itself.

    Args:
      what, sources: of `text_sources`.
      out: the new file.
      text_field, tokenizer: as for `open_corpus`.

    Raises:
      ConfigError: a file that holds no text, or a line, which it names.
    """
    every = (_encode_documents(path, text_field, tokenizer) for path, _ in sources)
    with _errors_of(what):
        return records.write_tokens(
            out, itertools.chain.from_iterable(every), tokenizer=tokenizer.identity,
            dtype=tokenizer.dtype, sources=tuple(digest for _, (digest,) in sources),
        )  # fmt: skip


def text_sources(what: str, patterns: Sequence[str]) -> list[Source]:
    """The files of text that match, for `tokenize`; arguments and errors as of `open_corpus`."""
    with _errors_of(what):
        paths = find_files(patterns)
        for path in paths:
            if path.suffix == records.SUFFIX and records.holds_tokens(path):
                raise ConfigError(f"{path} is a file of tokens already")
        return [Source(path, frozenset({_digest(path)})) for path in paths]


@contextlib.contextmanager
def _errors_of(what: str):
    """Names the field in errors of its files."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"task.{what}: {error}") from None


@contextlib.contextmanager
def _reading(path: pathlib.Path):
    """Names the file, which may have gone since it was found."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def _stamp(path: pathlib.Path) -> tuple[int, ...]:
    """Its size, and what a file that was written anew does not share with the old one."""
    with _reading(path):
        status = regular_status(path)
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


@functools.lru_cache(maxsize=16)  # evaluation makes the same task for each N
def _open(path: pathlib.Path, stamp, text_field: str, tokenizer: Tokenizer) -> _Part:
    size, *_ = stamp
    if path.suffix == records.SUFFIX and records.holds_tokens(path):
        return _open_tokens(path, size, tokenizer)
    if size > MOST_TEXT_BYTES:
        raise ConfigError(
            f"{path} has {size / 2**20:.0f} MiB of text, and at most {MOST_TEXT_BYTES / 2**20:.0f} "
            f"are tokenised at every start: once and for all it is done by python -m "
            f"launch.tokenize --config=.. --out=.."
        )
    digest = _digest(path)
    ids, text_bytes, lost_bytes = [], 0, 0
    for document in _encode_documents(path, text_field, tokenizer):
        text_bytes += document.text_bytes
        lost_bytes += document.lost_bytes
        if len(document.ids):
            ids.append(document.ids.astype(tokenizer.dtype))
    tokens = _TokensInMemory(
        np.array([len(each) for each in ids], np.int64),
        np.concatenate([np.zeros(0, tokenizer.dtype), *ids]),
    )
    digests = {digest, records.tokens_digest(tokens.tokens, tokens.lengths_D)} if ids else ()
    source = Source(path, frozenset(digests))
    return _Part(tokens, text_bytes, lost_bytes, _fingerprint(path, size, digest), source)


def _open_tokens(path: pathlib.Path, size: int, tokenizer: Tokenizer) -> _Part:
    file = records.TokenFile(path)
    index = file.index
    if index.tokenizer != tokenizer.identity:
        raise ConfigError(
            f"{path} was tokenised by {index.tokenizer}, and task.tokenizer is "
            f"{tokenizer.identity}; set task.tokenizer and task.special_tokens as they were then, "
            f"or tokenise the text again"
        )
    lost_bytes = 0 if tokenizer.identity == BYTES else index.lost_bytes
    source = Source(path, frozenset({index.digest, *index.sources}))
    fingerprint = _fingerprint(path, size, index.digest)
    return _Part(file, index.text_bytes, lost_bytes, fingerprint, source)


def _encode_documents(
    path: pathlib.Path, text_field: str, tokenizer: Tokenizer
) -> Iterator[Document]:
    """Each document; of one whose text is lost as a whole, no ids are left."""
    texts = _texts(path, text_field)
    while chunk := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        try:
            encoded = tokenizer.encode(chunk)
            lost = tokenizer.lost_bytes(chunk, encoded)
        except Exception as error:  # the tokenizers package raises bare Exceptions
            raise ConfigError(f"{path} cannot be tokenised: {error}") from None
        for text, ids, lost_bytes in zip(chunk, encoded, lost, strict=True):
            yield Document(ids, len(text.encode()), lost_bytes)


def _digest(path: pathlib.Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: pathlib.Path, size: int, digest: str) -> str:
    return f"{path.absolute()}: {size} bytes, sha256 {digest}"


def _texts(path: pathlib.Path, text_field: str) -> Iterator[str]:
    """The text of each document."""
    for place, line in _lines(path):
        try:
            row = json.loads(line.decode("utf-8-sig"))  # some programs begin a file with a mark
        except RecursionError:
            raise ConfigError(f"{path}, {place}, is no JSON: it is nested too deeply") from None
        except ValueError as error:
            raise ConfigError(f"{path}, {place}, is no JSON: {error}") from None
        if not isinstance(row, dict) or text_field not in row:
            raise ConfigError(f"{path}, {place}: {_no_field(row, text_field)}")
        text = row[text_field]
        if not isinstance(text, str):
            raise ConfigError(f"{path}, {place}: {text_field!r} is no text, but {text!r:.40}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{path}, {place}: {text_field!r} is no Unicode: {error}") from None
        yield text


def _lines(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == records.SUFFIX:
        for number, record in enumerate(records.Records(path)):
            yield f"record {number}", record
        return
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield f"line {number}", line


def _no_field(row, text_field: str) -> str:
    if not isinstance(row, dict) or not row:
        return f"it must be a JSON object with the field {text_field!r}"
    return (
        f"it has no field {text_field!r}, but {', '.join(row)}; set task.text_field; the nearest "
        f"is {nearest(text_field, row)!r}"
    )
