"""Window attention against a loop over queries, and its masks written out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attend

import sleepnet
from sleepnet.cycle import cache
from sleepnet.ops import window_attention

B, T, S, G, H, D = 2, 3, 7, 2, 4, 6
rng = np.random.default_rng(0)
Q = jnp.asarray(rng.normal(size=(B, T, H, D)), jnp.float32)
KEYS, VALUES = (jnp.asarray(rng.normal(size=(B, G, S, D)), jnp.float32) for _ in "kv")
full = jax.jit(window_attention.full)
masks = st.lists(st.booleans(), min_size=B * T * S, max_size=B * T * S)


def seen(mask):
    """A mask in which every query sees at least the last key."""
    mask = np.reshape(mask, (B, T, S))
    mask[..., -1] = True
    return mask


def segments(mask, *cuts):
    edges = [0, *cuts, S]
    return [
        (KEYS[:, :, a:b], VALUES[:, :, a:b], jnp.asarray(mask[..., a:b]))
        for a, b in itertools.pairwise(edges)
    ]


@settings(max_examples=15)
@given(masks, st.sampled_from(((), (3,), (2, 2, 6))))
def test_segments_are_one_softmax_over_what_may_be_seen(mask, cuts):
    """Keys in one segment or several, some empty; grouped heads share their key head."""
    mask = seen(mask)
    out = full(Q, segments(mask, *cuts))
    by_slot = (Q, *(jnp.swapaxes(x, 1, 2) for x in (KEYS, VALUES)))
    rows = [[np.asarray(x[b], np.float64) for x in by_slot] for b in range(B)]
    assert_agree(out, np.stack([attend(*row, mask[b]) for b, row in enumerate(rows)]))


def test_grouped_heads_are_repeated_heads():
    """G key heads that serve H / G queries each are H heads in which each stands H / G times."""
    mask = jnp.ones((B, T, S), bool)
    repeated = [(*(jnp.repeat(x, H // G, axis=1) for x in (KEYS, VALUES)), mask)]
    assert_agree(full(Q, segments(mask)), full(Q, repeated))


def test_step_is_one_query_of_full():
    """Without the axis T, the same numbers."""
    mask = seen(rng.uniform(size=B * T * S) < 0.5)
    whole = full(Q, segments(mask, 3))
    for t in range(T):
        at_t = [(k, v, m[:, t]) for k, v, m in segments(mask, 3)]
        assert_agree(window_attention.step(Q[:, t], at_t), whole[:, t])


def test_a_query_that_sees_nothing_is_finite():
    """Padding may see nothing at all: no NaN comes of it."""
    out = full(Q, segments(np.zeros((B, T, S), bool), 3))
    assert np.isfinite(out).all()


def test_extreme_scores_do_not_overflow():
    """The largest score takes all the weight."""
    mask = np.ones((B, T, S), bool)
    keys = jnp.zeros_like(KEYS).at[:, :, 4].set(1e4)
    out = full(jnp.ones_like(Q), [(keys, VALUES, jnp.asarray(mask))])
    expected = np.repeat(np.asarray(VALUES)[:, :, 4], H // G, axis=1)
    assert_agree(out, np.broadcast_to(expected[:, None], out.shape))


def config(eviction):
    return sleepnet.ModelConfig(
        vocab_size=8, pattern="A", d_model=4, num_heads=1, window=4, eviction=eviction
    )


def drawn(mask):
    return ["".join("x" if cell else "." for cell in row) for row in np.asarray(mask)]


# With L = 4, token p sees p-3..p: itself and the three before it. Slots of kept keys are the
# places -3, -2, -1; then come the window's own.
BANDED = [
    "xxx x...",
    ".xx xx..",
    "..x xxx.",
    "... xxxx",
]
BANDED_AFTER_ONE = [  # only one token came before
    "..x x...",
    "..x xx..",
    "..x xxx.",
    "... xxxx",
]


@pytest.mark.parametrize(("kept", "expected"), [(3, BANDED), (1, BANDED_AFTER_ONE)])
def test_sliding_band_counts_the_current_token(kept, expected):
    """The mask of a fresh window, as a matrix written by hand."""
    length, kept = jnp.asarray([4], jnp.int32), jnp.asarray([kept], jnp.int32)
    span = cache.fresh_span(config("sliding"), length, kept, 4)
    kept_mask, own_mask = span.masks
    assert drawn(np.concatenate([kept_mask[0], own_mask[0]], -1)) == [
        row.replace(" ", "") for row in expected
    ]


def test_hard_window_is_causal_and_hides_padding():
    """Two of three tokens valid: the third is no key; nothing is kept."""
    length = jnp.asarray([2], jnp.int32)
    span = cache.fresh_span(config("hard"), length, jnp.zeros_like(length), 3)
    (own_mask,) = span.masks
    assert drawn(own_mask[0]) == ["x..", "xx.", "xx."]


def test_later_tokens_see_kept_cached_and_own_keys():
    """Two new tokens behind two cached ones: places 2 and 3 of a sliding window."""
    window = sleepnet.init_state(config("sliding"), 1).window
    two = jnp.asarray([2], jnp.int32)
    window = window.replace(length_B=two, kept_B=two)
    span = cache.next_span(config("sliding"), window, two, 2)
    assert [drawn(mask[0]) for mask in span.masks] == [
        ["..x", "..."],  # kept: places -3, -2, -1, of which the last two are filled
        ["xx..", "xx.."],  # cached: places 0 and 1
        ["x.", "xx"],  # own: places 2 and 3
    ]
    np.testing.assert_array_equal(span.position_BT, [[2, 3]])
