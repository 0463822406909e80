"""The short convolution against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import convolve

from sleepnet.ops import short_conv

B, T, C = 3, 5, 4
full = jax.jit(short_conv.full)


def draw(seed, width):
    rng = np.random.default_rng(seed)
    shapes = (B, T, C), (width, C), (B, width - 1, C)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from((1, 2, 4)),
    length=st.tuples(*[st.integers(0, T)] * B),
)
def test_valid_tokens_and_tails_are_those_of_each_row_alone(seed, width, length):
    """A row of `length` valid tokens convolves and leaves the tail of just those, whatever
    padding follows; a row without tokens keeps its tail bit for bit."""
    x, kernel, tail = draw(seed, width)
    y, tail_out = full(x, kernel, tail, jnp.asarray(length, jnp.int32))
    for b, n in enumerate(length):
        exact = (np.asarray(a, np.float64) for a in (x[b, :n], kernel, tail[b]))
        expected_y, expected_tail = convolve(*exact)
        assert_agree(y[b, :n], expected_y)
        assert_identical(tail_out[b], expected_tail.astype(np.float32))


@pytest.mark.parametrize("width", [1, 4])
def test_token_by_token_is_the_whole(width):
    """`step` from tail to tail gives what `full` gives at once."""
    x, kernel, tail = draw(1, width)
    y, tail_out = full(x, kernel, tail, jnp.full((B,), T, jnp.int32))
    outs = []
    for t in range(T):
        out, tail = short_conv.step(x[:, t], kernel, tail)
        outs.append(out)
    assert_agree(np.stack(outs, 1), y)
    assert_identical(tail, tail_out)


def test_invalid_tokens_get_no_gradient():
    """Neither valid outputs nor the tail depend on padding."""
    x, kernel, tail = draw(2, 4)
    length = jnp.asarray([5, 2, 0], jnp.int32)
    valid = jnp.arange(T) < length[:, None]

    def functional(x):
        y, tail_out = full(x, kernel, tail, length)
        return jnp.sum(jnp.where(valid[..., None], y, 0.0) ** 2) + jnp.sum(tail_out**2)

    gradient = np.asarray(jax.grad(functional)(x))
    assert (gradient[~np.asarray(valid)] == 0).all()
    assert (gradient[np.asarray(valid)] != 0).all()
