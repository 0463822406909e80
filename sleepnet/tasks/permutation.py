"""A random order of many things, place by place: nothing is stored, and no place needs another."""

import functools
import hashlib

_ROUNDS = 6
_ODD = 0xFF51AFD7ED558CCD  # any odd number with well-mixed bits
_MASK = 2**64 - 1


def shuffled(place: int, size: int, key: bytes) -> int:
    """Which of 0..size - 1 stands at `place`, in the order that `key` chooses.

    A Feistel network over the next power of four, walked on until it falls below `size`: a
    bijection whatever the rounds do, the same in every process and with every version of NumPy.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        place = left << half | right
        if place < size:
            return place


def _mixed(x: int) -> int:
    x = (x ^ x >> 33) * _ODD & _MASK
    x = (x ^ x >> 33) * _ODD & _MASK
    return x ^ x >> 33


@functools.lru_cache(maxsize=1024)
def _round_keys(key: bytes) -> tuple[int, ...]:
    digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS, person=b"sleepnet.shuffle").digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
