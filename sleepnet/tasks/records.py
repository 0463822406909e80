"""ArrayRecord files of token ids: one stream in blocks of equal size, and last an index.

The index record is a line of JSON (`Index`) and the length of each document as int64. A reader
finds any token by a division, however long its document is.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sleepnet.config import ConfigError
from sleepnet.storage import replacing

SUFFIX = ".array_record"
_FORMAT = "sleepnet tokens 1"
_BLOCK = 8192  # tokens of a record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What a file of tokens says of itself."""

    format: str
    tokenizer: str  # its identity
    dtype: str
    documents: int
    tokens: int
    text_bytes: int  # of the text, in UTF-8
    digest: str  # SHA-256 of all tokens and lengths
    lost_bytes: int | None = None  # of the text; None: written before they were counted
    sources: tuple[str, ...] = ()  # SHA-256 of each file of text


class Document(NamedTuple):
    """The ids of a document, the bytes of its text and those that the ids do not determine."""

    ids: np.ndarray
    text_bytes: int
    lost_bytes: int = 0


def write_tokens(
    path: pathlib.Path,
    documents: Iterable[Document],
    *,
    tokenizer: str,
    dtype: np.dtype,
    sources: tuple[str, ...] = (),
) -> Index:
    """Writes documents, one block in memory at a time; of those without ids only the bytes count.

    Readers see the old file or the new one, never a part.
    """
    # Only here: reading goes through grain.
    from array_record.python.array_record_module import ArrayRecordWriter

    with replacing(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            return _write(writer, documents, tokenizer, np.dtype(dtype), sources)
        finally:
            writer.close()


def _write(writer, documents, tokenizer: str, dtype: np.dtype, sources: tuple[str, ...]) -> Index:
    digest, lengths, text_bytes, lost_bytes = hashlib.sha256(), [], 0, 0
    waiting = np.zeros(0, dtype)
    for ids, size, lost in documents:
        text_bytes += size
        lost_bytes += lost
        if not len(ids):
            continue
        lengths.append(len(ids))
        waiting = np.concatenate([waiting, ids.astype(dtype)])
        whole = len(waiting) - len(waiting) % _BLOCK
        for start in range(0, whole, _BLOCK):
            digest.update(block := waiting[start : start + _BLOCK].tobytes())
            writer.write(block)
        waiting = waiting[whole:]
    if len(waiting):
        digest.update(block := waiting.tobytes())
        writer.write(block)
    lengths_D = np.array(lengths, "<i8")
    digest.update(lengths_D.tobytes())  # as `tokens_digest`
    index = Index(
        format=_FORMAT,
        tokenizer=tokenizer,
        dtype=dtype.str,
        documents=len(lengths),
        tokens=int(lengths_D.sum()),
        text_bytes=text_bytes,
        digest=digest.hexdigest(),
        lost_bytes=lost_bytes,
        sources=sources,
    )
    head = json.dumps(dataclasses.asdict(index), allow_nan=False)
    writer.write(head.encode() + b"\n" + lengths_D.tobytes())
    return index


def tokens_digest(tokens: np.ndarray, lengths_D: np.ndarray) -> str:
    """The `Index.digest` of a file of these tokens."""
    digest = hashlib.sha256(tokens.data)
    digest.update(lengths_D.astype("<i8").data)
    return digest.hexdigest()


class TokenFile:
    """A file that `write_tokens` wrote.

    Attributes:
      index: what it says of itself.
      lengths_D: tokens of each document.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the index alone.

        Raises:
          ConfigError: the file is damaged, or holds no tokens.
        """
        self._records = Records(path)
        head, _, lengths = self._records[len(self._records) - 1].partition(b"\n")
        try:
            fields = json.loads(head)
            self.index = Index(**fields | {"sources": tuple(fields.get("sources", ()))})
            self.lengths_D = np.frombuffer(lengths, "<i8")
            self._dtype = np.dtype(self.index.dtype)
            blocks = -(-self.index.tokens // _BLOCK)
        except (AttributeError, RecursionError, TypeError, ValueError):
            raise ConfigError(f"{path}: its last record is no index of tokens") from None
        if len(self._records) != blocks + 1 or self.lengths_D.sum() != self.index.tokens:
            raise ConfigError(
                f"{path} is damaged: its index tells of {self.index.tokens} tokens in {blocks} "
                f"records, and there are {len(self._records) - 1}; write it again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop - 1, all documents written one after another.

        Raises:
          ConfigError: a block is damaged.
        """
        first = start // _BLOCK
        blocks = [self._records[number] for number in range(first, -(-stop // _BLOCK))]
        ids = np.frombuffer(b"".join(blocks), self._dtype)
        return ids[start - first * _BLOCK : stop - first * _BLOCK]


def holds_tokens(path: pathlib.Path) -> bool:
    """Whether `write_tokens` wrote an ArrayRecord file; else its records are text.

    Raises:
      ConfigError: the file is damaged, or no ArrayRecord.
    """
    records = Records(path)
    return len(records) > 0 and _FORMAT.encode() in records[len(records) - 1][:200]


class Records:
    """The records of an ArrayRecord file, by number.

    Raises:
      ConfigError: as it is opened or read: the file cannot be read, or is no whole ArrayRecord.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        with self._named_errors():
            import grain  # here, since it is slow to import and configs need only the tasks

            self._source: Any = grain.sources.ArrayRecordDataSource([str(path)])
            self._length = len(self._source)  # opens it

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> bytes:
        with self._named_errors():
            return self._source[number]

    def __iter__(self) -> Iterator[bytes]:
        return (self[number] for number in range(len(self)))

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except Exception as error:  # of many kinds, from a library of C++
            raise ConfigError(
                f"{self._path} is damaged, or no ArrayRecord file: {_line(error)}"
            ) from None


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
