"""A sleep in slices: the same minds, at any slice size, and work that is bounded by it."""

import dataclasses
import functools
import itertools

import jax
import minds
import numpy as np
import pytest
from agreement import assert_agree, assert_identical, rows
from minds import CONFIGS, RAGGED, SLIDING, TINY, B, L, W, newborn, params, stream, woken
from reference import Mind, fast_weights

import sleepnet
from sleepnet.cycle import cache
from sleepnet.cycle.slices import _slice
from sleepnet.evaluation.programs import Program
from sleepnet.nn import flops, model

both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def stages_of(config, state, *sizes, **options):
    """Yield every stage of a sleep whose slices take these sizes in turn, up to the last."""
    progress = sleepnet.begin_sleep(state, config=config, **options)
    yield progress
    for tokens in itertools.cycle(sizes):
        if progress.done:
            return
        progress = sleepnet.continue_sleep(params(config), progress, tokens=tokens)
        yield progress


def sleep_in_slices(config, state, *sizes, **options):
    *_, progress = stages_of(config, state, *sizes, **options)
    return sleepnet.finish_sleep(progress, state)


def sleep(config, state, **options):
    return sleepnet.sleep(params(config), state, config=config, **options)


def ragged_evening(config):
    """Minds with a past, their windows full, filled to two tokens and to five."""
    return woken(config, state=minds.older(config), length_B=RAGGED[:, 3])[1]


@both
def test_lives_with_sleeps_in_slices_follow_algorithm_1(config):
    """Four ragged windows, N = 3, slept on 4 tokens at a time, which do not divide the 6: every
    logit and every fast weight against the float64 model."""
    tokens, state = stream(), newborn(config)
    alone = [Mind(params(config), config) for _ in range(B)]
    for w in range(W):
        logits, state = woken(config, window=w, length_B=RAGGED[:, w], state=state)
        state = sleep_in_slices(config, state, 4)
        for b, mind in enumerate(alone):
            n = RAGGED[b, w]
            assert_agree(logits[b, :n], mind.live(tokens[b, w, :n], config.passes))
        assert_agree(state.fast_weights, fast_weights(alone))


@both
@pytest.mark.parametrize("chosen", [None, np.array([False, True, True])], ids=["all", "some"])
def test_a_sleep_in_slices_is_the_sleep(config, chosen):
    """All that the state holds behind it: fast weights, kept keys, tails and an empty window; of
    rows that do not sleep every bit."""
    state = ragged_evening(config)
    napped = sleep_in_slices(config, state, 4, rows_B=chosen)
    assert_agree(napped, sleep(config, state, rows_B=chosen))
    if chosen is not None:
        assert_identical(napped, cache.select_states(chosen, napped, state))


@both
def test_a_sleep_of_one_pass_is_done_at_once(config):
    """N = 1 commits what the wake pass wrote; so does a sleep in slices, bit for bit."""
    state = ragged_evening(config)
    (progress,) = stages_of(config, state, 4, passes=1)
    assert_identical(sleepnet.finish_sleep(progress, state), sleep(config, state, passes=1))


@pytest.mark.parametrize("sizes", [(1,), (L,), (5, 1)], ids=str)
def test_slices_of_any_size(sizes):
    """Token by token, a window at once, and sizes that change on the way."""
    state = ragged_evening(TINY)
    assert_agree(sleep_in_slices(TINY, state, *sizes), sleep(TINY, state))


@pytest.mark.slow
@both
@pytest.mark.parametrize("sizes", [(1,), (L,), (5, 1, 3)], ids=str)
def test_slices_of_any_size_in_large_minds(config, sizes):
    """The same with prelude, coda and kept keys."""
    state = ragged_evening(config)
    assert_agree(sleep_in_slices(config, state, *sizes), sleep(config, state))


@both
def test_an_unfinished_sleep_changes_nothing(config):
    """Neither the caller's state nor any earlier stage: it can be dropped or forked anywhere."""
    state = ragged_evening(config)
    copy = jax.tree.map(np.array, state)
    *_, before, last = stages_of(config, state, 4)
    assert_identical(state, copy)
    again = sleepnet.continue_sleep(params(config), before, tokens=4)
    assert_identical(again, last)
    slept = sleepnet.finish_sleep(last, state)
    *_, anew = stages_of(config, state, 4)
    assert_identical(sleepnet.finish_sleep(anew, state), slept)


@both
def test_a_nap_holds_no_more_than_the_caches_that_it_rewrites(config):
    """Beside the state that it began with: 16 bytes for each row, and features and caches of core
    and coda, once."""
    state = ragged_evening(config)
    begun, *_, last = stages_of(config, state, 4)
    assert fresh_bytes(begun, state) == 16 * B
    window = last.window
    own = (window.features_BLD, window.blocks["core"], window.blocks["coda"])
    assert 0 < fresh_bytes(last, state) - 16 * B <= sum(x.nbytes for x in jax.tree.leaves(own))


def fresh_bytes(progress, state):
    """Of the device's arrays in a stage that the state does not hold."""
    held = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    arrays = [x for x in jax.tree.leaves(progress) if isinstance(x, jax.Array)]
    return sum(x.nbytes for x in arrays if x.unsafe_buffer_pointer() not in held)


LONG = sleepnet.ModelConfig(vocab_size=16, pattern="AG", d_model=64, window=64, num_heads=2)


def test_the_work_of_a_slice_is_bounded():
    """16 of 64 tokens cost a quarter of a pass, within a tenth, though they attend to the whole
    window cache."""
    lowered = _slice.lower(
        params(LONG), newborn(LONG).window, np.int32(0), config=LONG, part="core", tokens=16
    )
    whole = B * flops.part_flops(LONG, "core", LONG.window)
    assert Program(lowered.compile()).dot_flops / whole == pytest.approx(1 / 4, rel=0.1)


def test_all_slices_of_a_part_share_one_program(monkeypatch):
    """Whatever the pass and the place: the core is traced once and the coda once."""
    config = dataclasses.replace(TINY, pattern="A[G]G", window=7, passes=4)
    _, state = sleepnet.wake(
        params(config), newborn(config), stream()[:, 0], config=config, logits="none"
    )
    traced, blocks = [], model.blocks

    def counting(*args, part, **options):
        traced.append(part)
        return blocks(*args, part=part, **options)

    monkeypatch.setattr(model, "blocks", counting)
    stages = list(stages_of(config, state, 3))
    assert len(stages) == 1 + 4 * 2  # 3 passes of the core and one of the coda, 6 tokens in each
    assert traced == ["core", "coda"]
    assert [progress.tokens_left for progress in stages] == list(range(24, -1, -3))


def test_a_nap_reads_no_further_than_its_longest_row():
    """A short sleep is short, and what remains of it is known beforehand."""
    state = ragged_evening(TINY)  # of 6, 2 and 5 tokens
    for chosen, tokens in (([True] * 3, 6), ([False, True, False], 2), ([False] * 3, 0)):
        progress = sleepnet.begin_sleep(state, config=TINY, rows_B=np.array(chosen))
        assert progress.tokens_left == (TINY.passes - 1) * tokens
        assert progress.done == (tokens == 0)


@pytest.mark.parametrize("tokens", [0, -1, L + 1, 2.0, True, None])
def test_slices_that_cannot_be_are_refused(tokens):
    """With the range that is allowed."""
    progress = sleepnet.begin_sleep(ragged_evening(TINY), config=TINY)
    with pytest.raises(ValueError, match=rf"an integer in 1..{L} .*; got {tokens}"):
        sleepnet.continue_sleep(params(TINY), progress, tokens=tokens)


def test_a_nap_ends_once_and_not_before():
    """Neither further slices nor an early commit; the message says what to do instead."""
    state = ragged_evening(TINY)
    begun, *_, last = stages_of(TINY, state, L)
    with pytest.raises(ValueError, match=r"read 0 of 12 tokens: `continue_sleep` until"):
        sleepnet.finish_sleep(begun, state)
    with pytest.raises(ValueError, match=r"the sleep is done: commit it by `finish_sleep`"):
        sleepnet.continue_sleep(params(TINY), last, tokens=L)


@both
@pytest.mark.optimized
def test_rows_that_are_awake_read_on_between_slices(config):
    """Rows 1 and 2 sleep; row 0 reads a token after the first slice, and keeps it bit for bit."""
    chosen, filled = np.array([False, True, True]), np.array([3, L, 2])
    state = woken(config, state=minds.older(config), length_B=filled)[1]
    begun, first, *_, last = stages_of(config, state, 4, rows_B=chosen)
    assert not (begun.done or first.done)
    _, later = woken(config, window=1, length_B=np.array([1, 0, 0]), state=state)
    slept = sleepnet.finish_sleep(last, later)
    assert np.asarray(slept.window.length_B).tolist() == [4, 0, 0]
    assert_identical(slept, cache.select_states(chosen, sleepnet.finish_sleep(last, state), later))


def test_a_row_that_sleeps_does_not_read():
    """Nor sleep otherwise: what it has would be lost, and the message names the row."""
    state = woken(TINY, length_B=np.array([3, 4, 2]))[1]
    *_, last = stages_of(TINY, state, L, rows_B=np.array([False, True, True]))
    _, later = woken(TINY, length_B=np.array([1, 0, 1]), state=state)
    with pytest.raises(ValueError, match=r"row 2 sleeps with 2 tokens .* now has 3"):
        sleepnet.finish_sleep(last, later)
    with pytest.raises(ValueError, match=r"row 1 sleeps with 4 tokens .* now has 0"):
        sleepnet.finish_sleep(last, sleep(TINY, state))


def test_a_sleep_ends_only_in_the_rows_that_it_found():
    """Windows as long that hold other tokens, read after a sleep or from the beginning, the same
    tokens read with other fast weights, and these alone: none of them is committed to. But awake
    rows may be anyone's, and what is the same content is the same state, wherever it lies."""
    state = woken(TINY, state=minds.older(TINY))[1]
    nights = [
        list(stages_of(TINY, state, L, rows_B=rows_B))[-1]
        for rows_B in (None, np.array([True, True, False]))
    ]
    stale = woken(TINY, seed=2, state=sleep(TINY, state))[1]
    strangers = (
        stale,
        woken(TINY, seed=2, state=minds.older(TINY))[1],
        woken(TINY)[1],
        state.replace(fast_weights=stale.fast_weights),
    )
    for progress in nights:
        for other in strangers:
            with pytest.raises(ValueError, match=rf"row 0 is not .* window of {L} tokens are"):
                sleepnet.finish_sleep(progress, other)
    moved = cache.select_states(np.array([True, True, False]), state, stale)
    with pytest.raises(ValueError, match="row 2 is not the one that fell asleep"):
        sleepnet.finish_sleep(nights[0], moved)
    slept = sleepnet.finish_sleep(nights[1], jax.tree.map(np.array, moved))
    assert_agree(slept, cache.select_states(nights[1].rows_B, sleep(TINY, state), stale))
    row_2 = functools.partial(jax.tree.map, lambda x, axis: rows(x, [2], axis))
    axes = cache.batch_axes(slept)
    assert_identical(row_2(slept, axes), row_2(stale, axes))


def test_a_nap_belongs_to_its_config_and_its_rows():
    """As a state does, from its beginning to its end."""
    state, other = ragged_evening(TINY), dataclasses.replace(TINY, window=L + 1)
    *_, progress = stages_of(TINY, state, L)
    for call in (
        lambda: sleepnet.begin_sleep(state, config=other),
        lambda: sleepnet.finish_sleep(progress, newborn(SLIDING)),
    ):
        with pytest.raises(ValueError, match="the state was made for another config"):
            call()
    with pytest.raises(ValueError, match=f"the sleep is of {B} rows, and the state has {B + 1}"):
        sleepnet.finish_sleep(progress, sleepnet.init_state(TINY, B + 1))
    with pytest.raises(ValueError, match="1 or more; got 0"):
        sleepnet.begin_sleep(state, config=TINY, passes=0)
    with pytest.raises(ValueError, match=r"rows_B must be bool of shape \(3,\)"):
        sleepnet.begin_sleep(state, config=TINY, rows_B=[1, 0])
