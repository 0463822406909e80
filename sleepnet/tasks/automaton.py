"""Rule 110 on a periodic ring: new = 0 for (left, centre, right) of 111, 100, 000, else 1."""

import functools

import numpy as np

_MAX_ENUMERATED_CELLS = 24
_SAMPLED_WORDS = 2**16  # of 64 states each
_CHUNK_WORDS = 2**12  # about a megabyte of planes
# Bits 0..5 of the numbers 0..63, one number per bit of the word.
_LOW_PLANES = (
    0xAAAAAAAAAAAAAAAA,
    0xCCCCCCCCCCCCCCCC,
    0xF0F0F0F0F0F0F0F0,
    0xFF00FF00FF00FF00,
    0xFFFF0000FFFF0000,
    0xFFFFFFFF00000000,
)


def evolve(bits: np.ndarray, steps: int, axis: int = -1) -> np.ndarray:
    """`bits` after so many steps, in the shape and dtype they came in.

    Args:
      bits: integers or bools with the ring along `axis`. Every bit of an integer is a ring of its
        own, so 0s and 1s are one ring, and uint64s are 64 at once.
      steps: how often the rule is applied.
      axis: along which the cells lie.
    """
    for _ in range(steps):
        left, right = np.roll(bits, 1, axis), np.roll(bits, -1, axis)
        bits = (bits | right) & ~(left & bits & right)
    return bits


def evolve_packed(state: int, cells: int, steps: int) -> int:
    """A whole ring in one integer, cell i in bit i, after so many steps.

    The fast form for one ring; it also takes an array of uint64 for rings of up to 64 cells.
    """
    top = cells - 1
    for _ in range(steps):
        left = (state << 1) | (state >> top)  # its bits beyond the ring meet zeros below
        right = (state >> 1) | ((state & 1) << top)
        state = (state | right) & ~(left & state & right)
    return state


@functools.cache
def probability_of_one(cells: int, steps: int) -> float:
    """P(a cell is 1) after so many steps from a uniformly random ring.

    Exact, over all states, up to 24 cells; beyond, over 2**22 states drawn from a fixed seed. All
    cells of a ring are alike, so the mean is taken over them as well.
    """
    num_words = max(1, 2**cells // 64) if cells <= _MAX_ENUMERATED_CELLS else _SAMPLED_WORDS
    rng = np.random.default_rng(110)
    ones = 0
    for start in range(0, num_words, _CHUNK_WORDS):
        words = np.arange(start, min(start + _CHUNK_WORDS, num_words), dtype=np.uint64)
        if cells <= _MAX_ENUMERATED_CELLS:
            planes = _all_states(words, cells)
        else:
            planes = rng.integers(2**64, size=(cells, len(words)), dtype=np.uint64)
        ones += int(np.bitwise_count(evolve(planes, steps, axis=0)).sum(dtype=np.int64))
    return ones / (num_words * 64 * cells)


def _all_states(words: np.ndarray, cells: int) -> np.ndarray:
    """(cells, words) uint64: bit j of plane i is bit i of the state 64 * word + j.

    Fewer than 6 cells have fewer than 64 states: then each stands in a word equally often.
    """
    low = [np.full_like(words, plane) for plane in _LOW_PLANES[:cells]]
    high = [-((words >> np.uint64(i)) & np.uint64(1)) for i in range(cells - len(low))]
    return np.stack(low + high)
