"""The names of Depo's nodes: words of one or more tokens."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Words:
    """All words of `min_length` to `max_length` symbols, numbered from 0, the shortest first.

    Where words may be longer than one token, the last token of each is raised by `symbols`, which
    marks its end.

    Raises:
      ValueError: there are more words than an int64 can number.
    """

    symbols: int
    min_length: int
    max_length: int

    def __post_init__(self):
        if self.count > np.iinfo(np.int64).max:
            raise ValueError(
                f"{self.symbols} symbols and words of up to {self.max_length} tokens make "
                f"{self.count} words; at most 2**63 - 1 can be numbered"
            )

    @functools.cached_property
    def _first(self) -> list[int]:
        """The number of the first word of each length, and the number of all words last."""
        first = [0]
        for length in range(self.min_length, self.max_length + 1):
            first.append(first[-1] + self.symbols**length)
        return first

    @property
    def count(self) -> int:
        """How many words there are."""
        return self._first[-1]

    @property
    def num_tokens(self) -> int:
        """How many different tokens they are written with."""
        return self.symbols if self.max_length == 1 else 2 * self.symbols

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        """The numbers of `n` distinct words, in a random order.

        The length of a word is uniform, and so are its symbols; a word that was had is drawn anew.
        """
        if n == self.count:
            return rng.permutation(n).tolist()
        distinct: dict[int, None] = {}
        while len(distinct) < n:
            distinct.update(dict.fromkeys(self._draw_any(rng, 2 * n).tolist()))
        # Likely words come early, so the order in which they came is not yet a random one.
        return rng.permutation(list(distinct)[:n]).tolist()

    def _draw_any(self, rng: np.random.Generator, n: int) -> np.ndarray:
        if self.min_length == self.max_length:
            return rng.integers(self.count, size=n)
        first = np.array(self._first)
        length = rng.integers(len(first) - 1, size=n)
        return rng.integers(first[length], first[length + 1])

    def tokens(self, word: int) -> list[int]:
        """How word number `word` is written."""
        length = self.min_length
        while word >= self.symbols**length:
            word -= self.symbols**length
            length += 1
        tokens = []
        for _ in range(length):
            word, symbol = divmod(word, self.symbols)
            tokens.append(symbol)
        if self.max_length > 1:
            tokens[-1] += self.symbols
        return tokens
