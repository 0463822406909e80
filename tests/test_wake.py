"""Wake: what a caller may rely on while a mind reads."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import minds
import numpy as np
import pytest
from agreement import assert_agree, assert_identical, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from minds import CONFIGS, HARD, SLIDING, TINY, B, L, newborn, older, params, stream, woken

import sleepnet
from sleepnet.cycle import wake as module
from sleepnet.types import WakeState

both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def wake(config, state, tokens, length_B=None, **options):
    """logits as a numpy array (slices of JAX arrays compile, one by one) and the state."""
    logits, state = sleepnet.wake(
        params(config), state, tokens, config=config, length_B=length_B, **options
    )
    return logits if logits is None else np.asarray(logits), state


def seen(state: WakeState) -> dict:
    """Everything that a later token can see of a state: the slots that are filled."""
    window = state.window
    filled = np.arange(L) < np.asarray(window.length_B)[:, None]

    def show(x_RBGSD):
        return np.where(filled[None, :, None, :, None], x_RBGSD, 0.0)

    attention, delta = [], []
    for part in window.blocks.values():
        for block in part:
            (attention if hasattr(block, "keys") else delta).append(block)
    return {
        "fast weights": state.fast_weights,
        "attention": [jax.tree.map(show, x) for x in attention],
        "delta": delta,
        "features": np.where(filled[..., None], window.features_BLD, 0.0),
        "length": window.length_B,
        "kept": window.kept_B,
        "carried": window.carried,
    }


def read(config, state, tokens, lengths):
    """Feeds each row `lengths[i]` more tokens per call, in calls of the same padded shape."""
    done, logits = np.zeros(B, int), np.zeros((B, L, config.vocab_size))
    for length in lengths:
        length = np.asarray(length, np.int32)
        place = np.minimum(done[:, None] + np.arange(L), L - 1)
        out, state = wake(config, state, np.take_along_axis(tokens, place, 1), length)
        for b, n in enumerate(length):
            logits[b, done[b] : done[b] + n] = out[b, :n]
        done += length
    return logits, state


@both
@settings(max_examples=10)
@given(st.tuples(*[st.tuples(st.integers(0, L), st.integers(0, L)) for _ in range(B)]))
def test_any_split_of_a_window_gives_the_same(config, cuts):
    """Rows cut at places of their own, in three calls, some of them empty: logits and the
    whole cache are those of one call."""
    first, second = np.sort(np.asarray(cuts, np.int32), axis=1).T
    tokens = stream(1)[:, 0]
    whole, state = woken(config, seed=1, state=older(config))
    logits, split = read(config, older(config), tokens, [first, second - first, L - second])
    assert_agree(logits, whole)
    assert_agree(seen(split), seen(state))


@both
def test_token_by_token_is_the_whole_window(config):
    """T = 1, L times: logits and the whole cache."""
    whole, state = woken(config, seed=1, state=older(config))
    outs, split = [], older(config)
    for t in range(L):
        out, split = wake(config, split, stream(1)[:, 0, t : t + 1])
        outs.append(out)
    assert_agree(np.concatenate(outs, 1), whole)
    assert_agree(seen(split), seen(state))


def test_calls_of_odd_sizes_give_the_same():
    """4 tokens and then 1 and 1: calls need not divide the window."""
    whole, state = woken(HARD, seed=1, state=older(HARD))
    outs, split = [], older(HARD)
    for a, b in ((0, 4), (4, 5), (5, 6)):
        out, split = wake(HARD, split, stream(1)[:, 0, a:b])
        outs.append(out)
    assert_agree(np.concatenate(outs, 1), whole)
    assert_agree(seen(split), seen(state))


@both
def test_logits_and_features_are_those_of_the_reference(config):
    """A newborn's first window agrees with the float64 model, in rows of any length."""
    length = np.array([6, 4, 0], np.int32)
    logits, state = woken(config, length_B=length)
    for b, n in enumerate(length):
        mind = minds.Mind(params(config), config)
        expected = mind.live(stream()[b, 0, :n], passes=1)
        assert_agree(logits[b, :n], expected)
        assert_agree(state.window.features_BLD[b, :n], mind.features)
    np.testing.assert_array_equal(state.window.length_B, length)


@functools.cache
def by_embedding():
    """d sum(logits * weights) / d embedding, of one row of distinct tokens."""
    state = newborn(TINY, 1)

    def functional(embedding, tokens, weights):
        logits, _ = sleepnet.wake(
            params(TINY) | {"embedding": embedding}, state, tokens, config=TINY
        )
        return jnp.sum(logits * weights)

    return jax.jit(jax.grad(functional))


def test_no_logit_depends_on_a_later_token():
    """By gradient: exactly 0 for every later token, and not 0 for any other."""
    tokens = np.array([[7, 2, 9, 4, 12, 0]], np.int32)
    for t in range(L):
        weights = np.zeros((1, L, TINY.vocab_size), np.float32)
        weights[0, t] = np.random.default_rng(t).normal(size=TINY.vocab_size)
        gradient = np.asarray(by_embedding()(params(TINY)["embedding"], tokens, weights))
        reached = np.abs(gradient[tokens[0]]).max(axis=1)
        assert (reached[: t + 1] > 0).all(), t
        assert (reached[t + 1 :] == 0).all(), t


@both
def test_a_later_token_changes_no_earlier_logit(config):
    """Bit for bit, and whatever crossed into the window."""
    tokens = stream(1)[:, 0]
    logits, _ = wake(config, older(config), tokens)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % config.vocab_size
    other, _ = wake(config, older(config), changed)
    assert_identical(other[:, :3], logits[:, :3])
    assert (np.abs(other[:, 3:] - logits[:, 3:]).max(axis=(1, 2)) > 0).all()


@both
def test_wake_leaves_fast_weights_bit_for_bit(config):
    """And all else that only a sleep may change; the caller's state stays alive."""
    before = older(config)
    copy = jax.tree.map(np.array, before)
    _, after = woken(config, seed=1, state=before)
    assert_identical(before, copy)
    assert_identical(after.fast_weights, copy.fast_weights)
    assert_identical(after.window.carried, copy.window.carried)
    assert_identical(after.window.kept_B, copy.window.kept_B)


def test_last_and_none_read_the_same_pass():
    """logits="last" is the row's last valid token's, and zeros where a row has none; "none" gives
    the same state."""
    length = np.array([6, 4, 0], np.int32)
    logits, state = wake(TINY, newborn(TINY), stream(1)[:, 0], length)
    last, state_last = wake(TINY, newborn(TINY), stream(1)[:, 0], length, logits="last")
    nothing, state_none = wake(TINY, newborn(TINY), stream(1)[:, 0], length, logits="none")
    assert_agree(last[:2], np.asarray(logits)[np.arange(2), length[:2] - 1])
    assert not last[2].any()
    assert nothing is None
    assert_agree(seen(state_last), seen(state))
    assert_agree(seen(state_none), seen(state))


@both
@pytest.mark.optimized
def test_a_row_does_not_see_its_neighbours(config):
    """Beside longer, shorter and empty rows a row's results are equal bit for bit; alone they
    agree."""
    tokens = stream(1)[:, 0]
    length = np.array([4, 6, 6], np.int32)
    logits, state = wake(config, older(config), tokens, length)
    strangers = tokens.copy()
    strangers[1:] = 5
    other, other_state = wake(config, older(config), strangers, np.array([4, 0, 2], np.int32))
    assert_identical(other[0, :4], logits[0, :4])
    assert_identical(features_and_states(other_state, 0), features_and_states(state, 0))
    alone, alone_state = wake(config, one_row(older(config), 0), tokens[:1], length[:1])
    assert_agree(alone[0, :4], logits[0, :4])
    assert_agree(features_and_states(alone_state, 0), features_and_states(state, 0))


def features_and_states(state, row):
    shown = seen(state)
    return [shown["features"][row], rows([shown["delta"], shown["attention"]], row, axis=1)]


def one_row(state, row):
    window = state.window
    batch_first = (window.features_BLD, window.length_B, window.kept_B)
    features, length, kept = (x[row : row + 1] for x in batch_first)
    stacked = (state.fast_weights, window.blocks, window.carried)
    fast_weights, blocks, carried = jax.tree.map(lambda x: x[:, row : row + 1], stacked)
    return WakeState(
        fast_weights, type(window)(blocks, carried, features, length, kept)
    )  # fmt: skip


@both
@pytest.mark.parametrize("padding", [-1, 10**6])
@pytest.mark.optimized
def test_padding_may_hold_any_number(config, padding):
    """Token ids behind a row's valid prefix are never read: no error, no NaN, same bits."""
    tokens, length = stream(1)[:, 0].copy(), np.array([4, 0, 5], np.int32)
    logits, state = wake(config, older(config), tokens, length)
    tokens[np.arange(L) >= length[:, None]] = padding
    other, other_state = wake(config, older(config), tokens, length)
    for b, n in enumerate(length):
        assert_identical(other[b, :n], logits[b, :n])
    assert_identical(seen(other_state), seen(state))
    chex.assert_tree_all_finite(other_state)


def test_an_empty_call_changes_nothing():
    """A row of length 0 keeps every bit of its mind."""
    _, before = woken(SLIDING, state=older(SLIDING), length_B=np.array([3, 0, 5], np.int32))
    _, after = wake(SLIDING, before, stream(2)[:, 0], np.zeros(B, np.int32))
    assert_identical(after, before)


def age(config, windows):
    state = newborn(config)
    for _ in range(windows):
        _, state = woken(config, state=state)
        state = sleepnet.sleep(params(config), state, config=config)
    return state


@both
def test_reading_costs_the_same_at_any_age(config):
    """A mind of many windows reads by the program of a newborn, and is no larger."""
    young, old = age(config, 1), age(config, 12)
    wake(config, newborn(config), TOKENS[:, :1])
    programs = module._wake._cache_size()
    wake(config, young, TOKENS[:, :1])
    wake(config, old, TOKENS[:, :1])
    assert module._wake._cache_size() == programs
    chex.assert_trees_all_equal_shapes_and_dtypes(newborn(config), young, old)


TOKENS = np.zeros((B, 2), np.int32)
BAD_CALLS = {
    "floats": (dict(tokens=TOKENS + 0.5), r"integers; got float"),
    "one axis": (dict(tokens=TOKENS[0]), r"shape \(B, T\).*\(2,\)"),
    "rows": (dict(tokens=TOKENS[:2]), r"3 rows.* 2"),
    "no tokens": (dict(tokens=TOKENS[:, :0]), r"1 to 6 tokens.*got 0"),
    "too many": (dict(tokens=np.zeros((B, 7), np.int32)), r"1 to 6 tokens.*got 7"),
    "shape of length": (dict(length_B=np.ones(2, np.int32)), r"length_B.*\(3,\).*\(2,\)"),
    "long length": (dict(length_B=np.array([1, 3, 2], np.int32)), r"0\.\.2; got 3 in row 1"),
    "negative length": (dict(length_B=np.array([1, 2, -1], np.int32)), r"0\.\.2; got -1 in row 2"),
    "id too large": (
        dict(tokens=TOKENS + np.int32([[0], [13], [0]])),
        r"id 13 in row 1 at place 0.*0\.\.12",
    ),
    "negative id": (
        dict(tokens=TOKENS - np.int32([[0, 0], [0, 0], [0, 1]])),
        r"id -1 in row 2 at place 1",
    ),
    "logits": (dict(logits="first"), r"all, last, none.*'first'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_named_with_what_is_allowed(case):
    """Every message shows the value, where it stands and what would fit."""
    changes, message = BAD_CALLS[case]
    call = dict(state=newborn(HARD), tokens=TOKENS) | changes
    with pytest.raises(ValueError, match=message):
        wake(HARD, **call)


def test_a_call_past_the_window_says_how_much_is_left():
    """The row, what it holds, and what still fits."""
    _, state = woken(HARD, length_B=np.array([3, 5, 6], np.int32))
    with pytest.raises(ValueError, match=r"row 1 holds 5 of 6 tokens.* 2 more: feed it 1"):
        wake(HARD, state, stream()[:, 0], np.array([2, 2, 0], np.int32))
    _, full = wake(HARD, state, stream()[:, 0], np.array([2, 1, 0], np.int32))
    np.testing.assert_array_equal(full.window.length_B, [5, 6, 6])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_where_no_one_looks_tokens_past_the_boundary_are_lost(config):
    """Under jit a row that is overfilled is the row filled to its boundary, now and later."""
    tokens = stream()[:, 0]
    _, started = wake(config, newborn(config), tokens[:, :4])
    blind = jax.jit(functools.partial(sleepnet.wake, config=config))
    _, overfull = blind(params(config), started, tokens)
    _, full = wake(config, started, tokens, np.full((B,), L - 4, np.int32))
    assert_identical(overfull.fast_weights, full.fast_weights)
    after = [
        wake(config, sleepnet.sleep(params(config), state, config=config), tokens)[0]
        for state in (overfull, full)
    ]
    assert_agree(*after)


def test_a_state_of_another_config_is_named():
    """Its window, its width, its dtype, or the blocks themselves."""
    for changes, message in (
        ({"window": 5}, r"features_BLD must have shape|keys must have shape"),
        ({"pattern": "G"}, r"made for another config: .* pattern '\[AGAG\]G'"),
        (
            {"compute_dtype": "bfloat16"},
            r"must have shape .* and dtype float32; got .* and bfloat16",
        ),
        ({"eviction": "sliding"}, r"made for another config: .* eviction 'hard'"),
    ):
        foreign = newborn(dataclasses.replace(HARD, **changes))
        with pytest.raises(ValueError, match=message):
            wake(HARD, foreign, TOKENS)


def test_lists_of_tokens_are_tokens():
    logits, _ = wake(HARD, newborn(HARD), TOKENS.tolist())
    assert_identical(logits, wake(HARD, newborn(HARD), TOKENS)[0])


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that lies as a device could take it without a copy of its own."""
    room = np.zeros(x.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    placed = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    placed[...] = x
    return placed


@pytest.mark.parametrize("call", ["wake", "lengths", "ingest", "decode", "sleep"])
def test_the_callers_arrays_may_be_written_to_as_soon_as_a_call_returns(call):
    """What is computed later is of what they held at the call."""
    config = dataclasses.replace(TINY, d_model=64, window=64)  # long enough to be overtaken
    mind = params(config), newborn(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (B, 64)).astype(np.int32)
    awake = sleepnet.wake(*mind, tokens, config=config)[1]
    calls = {
        "wake": (tokens, lambda x: sleepnet.wake(*mind, x, config=config)),
        "lengths": (
            np.array([64, 9, 30], np.int32),
            lambda x: sleepnet.wake(*mind, tokens, length_B=x, config=config),
        ),
        "ingest": (tokens, lambda x: sleepnet.sleep_from_tokens(*mind, x, config=config)),
        "decode": (tokens[:, 0], lambda x: sleepnet.Decoder(*mind, config=config).wake(x)),
        "sleep": (
            np.array([True, False, True]),
            lambda x: sleepnet.sleep(mind[0], awake, rows_B=x, config=config),
        ),
    }
    given, result_of = calls[call]
    expected = jax.tree.map(np.array, result_of(given.copy()))
    for _ in range(20):
        lent = aligned(given)
        result = result_of(lent)
        lent[...] = 1
        assert_identical(result, expected)


def test_shapes_are_checked_under_a_transformation_too():
    """Where values are traced, a call of the wrong size still raises."""
    with pytest.raises(ValueError, match="got 7"):
        jax.eval_shape(functools.partial(wake, HARD), newborn(HARD), jnp.zeros((B, 7), jnp.int32))
