"""Rotary positions against complex numbers."""

import jax.numpy as jnp
import numpy as np
import reference
from agreement import assert_agree, assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepnet.ops import rope

B, T, H, D, BASE = 2, 5, 3, 6, 100.0
rng = np.random.default_rng(0)
X, Y = (jnp.asarray(rng.normal(size=(B, T, H, D)), jnp.float32) for _ in range(2))
places = st.lists(st.integers(-64, 64), min_size=B * T, max_size=B * T)


def rotate(x, place):
    return rope.rotate(x, jnp.asarray(place, jnp.int32), base=BASE)


@settings(max_examples=20)
@given(places)
def test_rotation_turns_pairs_of_halves(place):
    """Pair (i, i + D/2) turns by place * base^(-2i/D), row by row, before or after 0."""
    place = np.reshape(place, (B, T))
    expected = [
        reference.rotate(np.asarray(x, np.float64), p, BASE) for x, p in zip(X, place, strict=True)
    ]
    assert_agree(rotate(X, place), np.stack(expected))


@settings(max_examples=20)
@given(places, st.integers(0, 64))
def test_rotations_add_up(place, n):
    """Turning by p and then by -n is turning by p - n: how kept keys get smaller places."""
    place = np.reshape(place, (B, T))
    assert_agree(rotate(rotate(X, place), np.full_like(place, -n)), rotate(X, place - n))


@settings(max_examples=20)
@given(places, st.integers(-64, 64))
def test_scores_depend_on_distance_only(place, shift):
    """Query and key moved together give the same score."""
    place = np.reshape(place, (B, T))

    def scores(query_place, key_place):
        q, k = rotate(X, query_place), rotate(Y, key_place)
        return np.einsum("bthd,bshd->bhts", q, k)

    assert_agree(scores(place + shift, place[::-1] + shift), scores(place, place[::-1]))


def test_place_zero_is_no_rotation():
    """The first token of a window is left bit for bit."""
    assert_identical(rotate(X, np.zeros((B, T))), X)
