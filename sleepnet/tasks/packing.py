"""How documents of any length become rows of W windows: by arithmetic on their lengths."""

import bisect
import itertools
from typing import NamedTuple

import numpy as np

from sleepnet.tasks.permutation import shuffled


class Piece(NamedTuple):
    """What one row holds of one document.

    Attributes:
      start: the place of its first token, all documents of the corpus written one after another.
      length: in tokens.
      windows: how many it takes; all but the last are full.
      ends: whether the document ends with it.
    """

    start: int
    length: int
    windows: int
    ends: bool


class _Pattern(NamedTuple):
    """Rows that are alike: how many pieces of each size, and how many pieces went before them."""

    first_row: int
    pieces_of_size: dict[int, int]
    before: dict[int, int]


class Packing:
    """Every token of a corpus, once in an epoch, in rows of W windows of L tokens.

    A document begins at a window's start. One of more than W windows is cut into pieces of W and
    a rest. Pieces are packed into rows, the largest first; each row takes what still fits.

    How many pieces of which size meet in a row is the same in every epoch; which, and the order of
    rows, is drawn anew. Both are functions of (key, row): there is no state, and no row needs
    another.
    """

    def __init__(self, lengths_D: np.ndarray, window: int, num_windows: int, key: bytes):
        """`key` chooses the orders; documents have 1 token or more, and 32 bytes here."""
        self._key = key
        self._num_windows = num_windows
        self._most = window * num_windows  # tokens of a piece
        self._lengths_D = np.asarray(lengths_D, np.int64)
        self._starts_D = np.cumsum(self._lengths_D) - self._lengths_D
        # All pieces of a document but its last one are full: only the last ones are listed.
        full_D = (self._lengths_D - 1) // self._most
        self._full_before_D = np.cumsum(full_D) - full_D
        self._full = int(full_D.sum())
        size_D = -(-(self._lengths_D - full_D * self._most) // window)
        self._by_size_D = np.argsort(size_D.astype(np.int32), kind="stable")
        counts = np.bincount(size_D, minlength=num_windows + 1)
        self._first_of_size = [0, *itertools.accumulate(counts.tolist())]
        counts[num_windows] += self._full
        self._count_of_size = counts.tolist()
        self._patterns, self.rows = _patterns(self._count_of_size, num_windows)
        self._first_rows = [pattern.first_row for pattern in self._patterns]

    @property
    def longest(self) -> int:
        """Windows of the longest piece; 0 in an empty corpus."""
        return max((size for size, count in enumerate(self._count_of_size) if count), default=0)

    @property
    def fill(self) -> float:
        """The share of all places that holds a token."""
        return float(self._lengths_D.sum()) / (self.rows * self._most)

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`; rows 0..rows - 1 are the first epoch, and so on."""
        epoch, place = divmod(index, self.rows)
        row = shuffled(place, self.rows, self._key_of(epoch, 0))
        pattern = self._patterns[bisect.bisect_right(self._first_rows, row) - 1]
        repeat = row - pattern.first_row
        return [
            self._piece(epoch, size, pattern.before[size] + repeat * pieces + i)
            for size, pieces in pattern.pieces_of_size.items()
            for i in range(pieces)
        ]

    def _piece(self, epoch: int, size: int, place: int) -> Piece:
        chosen = shuffled(place, self._count_of_size[size], self._key_of(epoch, size))
        if size == self._num_windows:
            if chosen < self._full:
                return self._full_piece(chosen)
            chosen -= self._full
        document = self._by_size_D[self._first_of_size[size] + chosen]
        length = int(self._lengths_D[document] - 1) % self._most + 1
        end = int(self._starts_D[document] + self._lengths_D[document])
        return Piece(end - length, length, size, ends=True)

    def _full_piece(self, number: int) -> Piece:
        document = np.searchsorted(self._full_before_D, number, side="right") - 1
        skipped = (number - int(self._full_before_D[document])) * self._most
        start = int(self._starts_D[document]) + skipped
        return Piece(start, self._most, self._num_windows, ends=False)

    def _key_of(self, epoch: int, size: int) -> bytes:
        return b"%b %d %d" % (self._key, epoch, size)


def _patterns(count_of_size: list[int], num_windows: int) -> tuple[list[_Pattern], int]:
    """Fills one row greedily and repeats it as long as pieces last; a few patterns suffice."""
    left, used = list(count_of_size), [0] * len(count_of_size)
    patterns, rows = [], 0
    while any(left):
        room, row = num_windows, {}
        for size in range(num_windows, 0, -1):
            if take := min(left[size], room // size):
                row[size] = take
                room -= take * size
        patterns.append(_Pattern(rows, row, {size: used[size] for size in row}))
        repeats = min(left[size] // take for size, take in row.items())
        for size, take in row.items():
            left[size] -= repeats * take
            used[size] += repeats * take
        rows += repeats
    return patterns, rows
