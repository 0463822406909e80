"""Sleep: what it commits, and what it leaves behind."""

import dataclasses

import chex
import jax
import minds
import numpy as np
import pytest
from agreement import assert_agree, assert_identical
from minds import CONFIGS, FULL, HARD, RAGGED, SLIDING, TINY, B, L, W, newborn, params, stream
from minds import woken as wake_window
from reference import Mind, fast_weights

import sleepnet
from sleepnet.cycle import cache
from sleepnet.types import WakeState

both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def sleep(config, state, **options):
    return sleepnet.sleep(params(config), state, config=config, **options)


def live(config, ragged, windows=W):
    """Yields the logits and the state after the sleep of every window of the stream."""
    state = newborn(config)
    lengths = RAGGED if ragged else FULL
    for w in range(windows):
        logits, state = wake_window(config, window=w, length_B=lengths[:, w], state=state)
        state = sleep(config, state)
        yield logits, state


@both
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_lives_follow_algorithm_1(config, ragged):
    """Four windows, N = 3, against the float64 model: every logit, and every fast weight after
    every sleep; with prelude, coda, repeats, both evictions, rows of any length and none."""
    lengths, tokens = (RAGGED if ragged else FULL), stream()
    alone = [Mind(params(config), config) for _ in range(B)]
    for w, (logits, state) in enumerate(live(config, ragged)):
        for b, mind in enumerate(alone):
            n = lengths[b, w]
            assert_agree(logits[b, :n], mind.live(tokens[b, w, :n], config.passes))
        assert_agree(state.fast_weights, fast_weights(alone))


@both
def test_ingesting_tokens_is_waking_and_sleeping(config):
    """N - 1 passes behind a wake pass leave what N passes over the tokens leave: fast weights,
    kept keys, tails; in ragged rows, window after window."""
    tokens, state = stream(), newborn(config)
    for w, (_, slept) in enumerate(live(config, ragged=True, windows=3)):
        state = sleepnet.sleep_from_tokens(
            params(config), state, tokens[:, w], config=config, length_B=RAGGED[:, w]
        )
        assert_agree(crossed(state), crossed(slept))


def crossed(state):
    """All that is not empty behind a sleep, and can be seen."""
    window = state.window
    place = np.arange(1 - L, 0)
    visible = place >= -np.asarray(window.kept_B)[:, None]

    def show(kept):
        if kept is None or not hasattr(kept, "keys"):
            return kept
        return jax.tree.map(lambda x: np.where(visible[None, :, None, :, None], x, 0.0), kept)

    carried = {part: tuple(map(show, kept)) for part, kept in window.carried.items()}
    return {
        "fast weights": state.fast_weights,
        "carried": carried,
        "kept": window.kept_B,
        "length": window.length_B,
    }


@both
def test_one_pass_costs_nothing_and_commits_the_working_weights(config):
    """N = 1: what the wake pass wrote, bit for bit."""
    _, state = wake_window(config, state=minds.older(config))
    slept = sleep(config, state, passes=1)
    assert_identical(slept.fast_weights, cache.fast_weights_of(state.window.blocks))
    np.testing.assert_array_equal(slept.window.length_B, 0)


def test_passes_given_here_rule_over_those_of_the_config():
    """`passes` may differ from the trained N, and follows Algorithm 1 with that N."""
    _, state = wake_window(TINY, state=newborn(TINY))
    for passes in (2, 5):
        alone = [Mind(params(TINY), TINY) for _ in range(B)]
        for b, mind in enumerate(alone):
            mind.live(stream()[b, 0], passes)
        slept = sleep(TINY, state, passes=passes)
        assert_agree(slept.fast_weights, fast_weights(alone))
    config = dataclasses.replace(TINY, passes=5)
    assert_identical(sleepnet.sleep(params(TINY), state, config=config), slept)


@pytest.mark.parametrize("passes", [0, -1, 2.0, True, "3"])
def test_passes_below_one_are_refused(passes):
    """And everything that is no whole number; the message shows it."""
    with pytest.raises(ValueError, match=f"1 or more; got {passes!r}"):
        sleep(HARD, newborn(HARD), passes=passes)
    with pytest.raises(ValueError, match=f"1 or more; got {passes!r}"):
        sleepnet.sleep_from_tokens(
            params(HARD), newborn(HARD), stream()[:, 0], config=HARD, passes=passes
        )


@both
@pytest.mark.optimized
def test_only_selected_rows_sleep(config):
    """The others keep every bit of their mind and window; selected rows sleep as ever."""
    _, awake = wake_window(config, state=minds.older(config), length_B=RAGGED[:, 3])
    everyone = sleep(config, awake)
    chosen = np.array([True, False, True])
    some = sleep(config, awake, rows_B=chosen)
    expected = cache.select_states(chosen, everyone, awake)
    assert_identical(by_row(some, ~chosen), by_row(awake, ~chosen))
    assert_agree(by_row(some, chosen), by_row(everyone, chosen))
    chex.assert_trees_all_equal_shapes_and_dtypes(some, expected)


def by_row(state, rows_B):
    """The leaves of a state with only these rows, found by the axis of length B."""
    window = state.window
    stacked = (state.fast_weights, window.blocks, window.carried)
    first = (window.features_BLD, window.length_B, window.kept_B)
    return [
        [np.asarray(x)[:, rows_B] for x in jax.tree.leaves(stacked)],
        [np.asarray(x)[rows_B] for x in first],
    ]


def test_rows_of_the_wrong_shape_are_refused():
    """One flag per row."""
    with pytest.raises(
        ValueError, match=r"rows_B must be bool of shape \(3,\); got bool of shape \(2,\)"
    ):
        sleep(HARD, newborn(HARD), rows_B=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"rows_B must be bool of shape \(3,\); got int"):
        sleep(HARD, newborn(HARD), rows_B=[0, 1, 2])


@both
def test_a_row_without_tokens_sleeps_without_a_trace(config):
    """Fast weights and all that crosses stay bit for bit."""
    before = minds.older(config)
    _, awake = wake_window(config, state=before, length_B=np.array([0, 3, 0], np.int32))
    after = sleep(config, awake)
    empty = np.array([True, False, True])
    window, was = after.window, before.window
    for x, y in zip(
        jax.tree.leaves((after.fast_weights, window.carried)),
        jax.tree.leaves((before.fast_weights, was.carried)),
        strict=True,
    ):
        assert_identical(np.asarray(x)[:, empty], np.asarray(y)[:, empty])
    assert_identical(np.asarray(window.kept_B)[empty], np.asarray(was.kept_B)[empty])


def test_hard_eviction_leaves_nothing_but_fast_weights():
    """A slept mind is a newborn one with its fast weights: nothing else of any window is left,
    and so minds with equal fast weights have, bit for bit, the same future."""
    _, awake = wake_window(HARD, seed=1, state=minds.older(HARD), length_B=RAGGED[:, 1])
    slept = sleep(HARD, awake)
    transplanted = with_fast_weights(newborn(HARD), slept.fast_weights)
    assert_identical(slept, transplanted)
    logits, future = wake_window(HARD, seed=3, state=slept)
    other_logits, other_future = wake_window(HARD, seed=3, state=transplanted)
    assert_identical(other_logits, logits)
    assert_identical(sleep(HARD, other_future), sleep(HARD, future))


def with_fast_weights(state, fast_weights):
    """The mind of `state` with other fast weights, both the persistent and the working ones."""
    blocks = {
        part: tuple(
            block if weights is None else block.replace(state=weights)
            for block, weights in zip(of_part, fast_weights[part], strict=True)
        )
        for part, of_part in state.window.blocks.items()
    }
    return WakeState(fast_weights, state.window.replace(blocks=blocks))


def test_the_callers_state_stays_alive():
    """Sleep takes nothing from its caller: forks are copies of a name."""
    _, awake = wake_window(HARD, state=minds.older(HARD))
    copy = jax.tree.map(np.array, awake)
    first, second = sleep(HARD, awake), sleep(HARD, awake)
    assert_identical(awake, copy)
    assert_identical(first, second)


def test_one_long_window_is_the_plain_hybrid():
    """A window as long as the text, N = 1: no window is ever felt, whatever the eviction."""
    text = stream(4)[:, :2].reshape(B, 2 * L)
    config = dataclasses.replace(TINY, window=2 * L, passes=1)
    logits, state = sleepnet.wake(params(TINY), newborn(config), text, config=config)
    for b in range(B):
        mind = Mind(params(TINY), dataclasses.replace(config, eviction="sliding"))
        assert_agree(np.asarray(logits)[b], mind.live(text[b], passes=1))
    chex.assert_tree_all_finite(state)


def test_sliding_windows_of_one_pass_are_one_banded_attention():
    """Pattern A, N = 1: three windows with a nap in the middle of one read as a plain banded
    Transformer reads the whole text, with absolute positions."""
    config = dataclasses.replace(SLIDING, pattern="A", learned_positions=False, passes=1)
    text = stream(5)[:, :3].reshape(B, 3 * L)
    state, logits, start = newborn(config), [], 0
    for taken in (L, 2, L, L - 2):  # a nap after 2
        piece = np.resize(text[:, start : start + taken], (B, L))
        piece[:, :taken] = text[:, start : start + taken]
        out, state = sleepnet.wake(
            params(config), state, piece, config=config, length_B=np.full(B, taken, np.int32)
        )
        state = sleepnet.sleep(params(config), state, config=config)
        logits.append(np.asarray(out)[:, :taken])
        start += taken
    logits = np.concatenate(logits, 1)
    for b in range(B):
        assert_agree(logits[b], banded(config, text[b, :start]))


def banded(config, text):
    """The same network over the whole text at once: the band is that of `config.window`."""
    mind = Mind(params(config), config)
    return mind.live(text, passes=1)


def test_a_window_in_progress_cannot_ingest():
    """`sleep_from_tokens` starts at a boundary; the message says what to do instead."""
    _, awake = wake_window(HARD, length_B=np.array([0, 2, 3], np.int32), state=newborn(HARD))
    with pytest.raises(ValueError, match=r"row 1 already holds 2 tokens.*`sleep` first"):
        sleepnet.sleep_from_tokens(params(HARD), awake, stream()[:, 0, :2], config=HARD)


def test_a_restless_life_stays_finite():
    """Sleeping with empty windows, waking with no tokens, at every place of a window."""
    state, nothing = newborn(SLIDING), np.zeros(B, np.int32)
    for length in (nothing, RAGGED[:, 1], nothing, FULL[:, 0]):
        _, state = wake_window(SLIDING, length_B=length, state=state)
        state = sleep(SLIDING, sleep(SLIDING, state))
        chex.assert_tree_all_finite(state)


@both
def test_a_mind_that_computes_in_bfloat16_keeps_float32_weights(config):
    """They are those of float32 up to the roundings on the longest way through two windows."""
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    (*_, (_, slept)), (*_, (_, expected)) = (
        live(c, ragged=False, windows=2) for c in (half, config)
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(slept.fast_weights)} == {"float32"}
    roundings = 2 * config.passes * config.num_blocks  # of 2^-8 each
    assert_agree(slept.fast_weights, expected.fast_weights, tol=2.0**-8 * roundings)
