"""Which randomness makes an example, and which split a thing belongs to."""

import hashlib
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from sleepnet.integers import as_integer

SPLITS = ("train", "test")

_Thing = TypeVar("_Thing")


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one example, independent of those of every other.

    Raises:
      ValueError: an unknown split or a negative index.
    """
    check_split(split)
    # Philox counts upwards in the first word, so no example can run into the next one's numbers.
    counter = np.array([0, 0, 0, as_index(index)], np.uint64)
    key = _PhiloxKey(seed, SPLITS.index(split))
    # NumPy's stubs do not know that a bit generator takes any ISeedSequence.
    philox = np.random.Philox(key, counter=counter)  # pyright: ignore[reportArgumentType]
    return np.random.Generator(philox)


def as_index(index) -> int:
    """Return the index of an example as a Python int; raise ValueError for what is not one."""
    return as_integer("the index of an example", index, 0, 2**64 - 1)


def check_split(split: str):
    """Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {SPLITS}")


class _PhiloxKey(ISeedSequence):
    """Hands Philox its key as it is.

    Philox(key=..) does the same, but first asks the operating system for entropy that it then
    leaves unused; that takes longer than all the rest of it.
    """

    def __init__(self, high: int, low: int):
        self._key = np.array([high, low], np.uint64)

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        if n_words != 2 or dtype is not np.uint64:
            raise ValueError(f"the key is two uint64, not {n_words} {dtype.__name__}")
        return self._key


def split_of(identity: bytes, test_fraction: float) -> str:
    """The one split that holds a thing.

    It depends on nothing but its arguments, so neither another seed nor another process moves a
    test thing into training.
    """
    digest = hashlib.blake2b(identity, digest_size=8, key=b"sleepnet.tasks").digest()
    return "test" if int.from_bytes(digest, "little") / 2**64 < test_fraction else "train"


def draw_in_split(
    split: str,
    test_fraction: float,
    draw: Callable[[], _Thing],
    identity: Callable[[_Thing], bytes],
) -> _Thing:
    """Draws until a thing falls into `split`: what it draws, given that split.

    Raises:
      ValueError: nothing fell into the split in so many draws that it must be empty.
    """
    fraction = test_fraction if split == "test" else 1 - test_fraction
    for _ in range(draws := math.ceil(100 / fraction)):
        thing = draw()
        if split_of(identity(thing), test_fraction) == split:
            return thing
    raise ValueError(
        f"the {split} split is empty: none of {draws} draws fell into it; the task is too small "
        f"for test_fraction={test_fraction}"
    )
