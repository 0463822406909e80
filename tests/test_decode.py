"""Decoder: the same minds as those of `wake` and `sleep`, in a state updated in place."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from agreement import assert_agree
from minds import CONFIGS, HARD, TINY, B, L, newborn, params, stream, woken

import sleepnet
from sleepnet.inference import decoder as decoding

FILLED = np.array([0, 2, 5], np.int32)


def filled(config):
    """Minds whose rows hold 0, 2 and 5 tokens of their second window."""
    old = sleepnet.sleep(params(config), woken(config)[1], config=config)
    return woken(config, window=1, length_B=FILLED, state=old)[1]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_life_is_that_of_wake_and_sleep(config):
    """Two windows, token after token, rows that sleep when each is full: all logits, and the
    state after each sleep."""
    state = filled(config)
    decoder = sleepnet.Decoder(params(config), state, config=config)
    tokens = stream(seed=3)
    for i in range(2 * L):
        full_B = np.array(state.window.length_B) == L
        if full_B.any():
            decoder.sleep(passes=3, rows_B=full_B)
            state = sleepnet.sleep(params(config), state, config=config, passes=3, rows_B=full_B)
            assert_agree(decoder.state, state)
        np.testing.assert_array_equal(decoder.room_B, L - np.array(state.window.length_B))
        tokens_B = tokens[:, i // L, i % L]
        logits_BY = decoder.wake(tokens_B)
        expected, state = sleepnet.wake(
            params(config), state, tokens_B[:, None], config=config, logits="last"
        )
        assert_agree(logits_BY, expected)
    assert_agree(decoder.state, state)


def test_states_given_and_taken_stay_alive():
    state = filled(TINY)
    before = jax.tree.map(np.array, state)
    decoder = sleepnet.Decoder(params(TINY), state, config=TINY)
    taken = decoder.state
    decoder.wake(stream()[:, 0, 0])
    for alive in (state, taken):
        jax.tree.map(np.testing.assert_array_equal, alive, before)


def test_a_refused_token_changes_nothing():
    decoder = sleepnet.Decoder(params(TINY), filled(TINY), config=TINY)
    decoder.wake([1, 2, 3])
    before = jax.tree.map(np.array, decoder.state)
    vocab_size = TINY.vocab_size
    for tokens, complaint in (
        ([1, 2, 3], f"row 2 holds {L} of {L} tokens .* then sleep"),
        ([1, 2], r"shape \(3,\); got \(2,\)"),
        ([1.0, 2.0, 3.0], "integers; got float64"),
    ):
        with pytest.raises(ValueError, match=complaint):
            decoder.wake(tokens)
    decoder.sleep(rows_B=np.array([False, False, True]))
    slept = jax.tree.map(np.array, decoder.state)
    with pytest.raises(
        ValueError, match=rf"token id {vocab_size} in row 1 at place 0 .* 0\.\.{vocab_size - 1}"
    ):
        decoder.wake([0, vocab_size, 0])
    jax.tree.map(np.testing.assert_array_equal, decoder.state, slept)
    jax.tree.map(
        np.testing.assert_array_equal,
        decoder.state.fast_weights["core"][1][:, :2], before.fast_weights["core"][1][:, :2],
    )  # fmt: skip
    decoder.wake([1, 2, 3])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_interrupt_within_a_token_costs_nothing(config, monkeypatch):
    """Rows of any fill level are read again where their tokens are known."""
    state, tokens_B = filled(config), np.array([1, 2, 3])
    tokens_BL = stream()[:, 1]  # that `filled` has read
    options = {"tokens_BL": tokens_BL, "logits_BY": np.ones((B, config.vocab_size))}
    decoder = sleepnet.Decoder(params(config), state, config=config, **options)
    unknown = sleepnet.Decoder(params(config), state, config=config)
    monkeypatch.setattr(decoding, "step", interrupted(decoding.step))
    for each in (decoder, unknown):
        with pytest.raises(KeyboardInterrupt):
            each.wake(tokens_B)
        np.testing.assert_array_equal(each.length_B, FILLED)
    monkeypatch.undo()
    assert_agree(decoder.state, state)
    np.testing.assert_array_equal(decoder.logits_BY, options["logits_BY"])
    expected, state = sleepnet.wake(
        params(config), state, tokens_B[:, None], config=config, logits="last"
    )
    assert_agree([decoder.wake(tokens_B), decoder.state], [expected, state])
    with pytest.raises(ValueError, match="their tokens are not known: set `state`"):
        unknown.wake(tokens_B)
    unknown.state = state
    assert_agree(unknown.state, state)


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [((2,), ["last"]), (decoding._PIECES, ["last", "all"])],
    ids=["several pieces", "one piece"],
)
def test_each_rows_logits_are_those_after_its_own_last_token(pieces, kinds, monkeypatch):
    """Whatever the other rows read: in calls that leave rows out, when windows are read again in
    one piece or in several, after an interrupt, and in `wake` of all rows. The oracle is one
    `wake` over the whole windows."""
    monkeypatch.setattr(decoding, "_PIECES", pieces)
    tokens, whole = stream()[:, 0], woken(TINY)[0]
    opening = np.random.default_rng(0).normal(size=(B, TINY.vocab_size)).astype(np.float32)

    def assert_expects(decoder, length_B, unread):
        last = whole[np.arange(B), np.maximum(length_B, 1) - 1]
        expected = np.where(np.array(length_B)[:, None] > 0, last, unread)
        assert_agree(decoder.logits_BY, expected)

    for known in (None, opening):
        decoder = sleepnet.Decoder(params(TINY), newborn(TINY), config=TINY, logits_BY=known)
        unread, length_B = 0 if known is None else known, np.zeros(B, int)
        calls = np.array([[2, 0, 1], [0, 0, 1], [1, 0, 0], [2, 2, 0]])
        for logits, more_B in zip(itertools.cycle(kinds), calls, strict=False):
            place_BT = np.minimum(length_B[:, None] + np.arange(more_B.max()), L - 1)
            next_BT = np.take_along_axis(tokens, place_BT, axis=1)
            given = decoder.read(next_BT, length_B=more_B, logits=logits)
            length_B += more_B
            assert_expects(decoder, length_B, unread)
            if logits == "last":
                np.testing.assert_array_equal(given, decoder.logits_BY)
        decoder.rewind([4, 0, 1], opening_BY=opening)
        assert_expects(decoder, [4, 0, 1], opening)
        with monkeypatch.context() as during:
            during.setattr(decoding, "step", interrupted(decoding.step))
            with pytest.raises(KeyboardInterrupt):
                decoder.wake(np.zeros(B, int))
        assert_expects(decoder, [4, 0, 1], opening)
        decoder.rewind([3, 0, 0])  # what row 1 expects is still known
        assert_expects(decoder, [3, 0, 0], opening * [[1], [1], [0]])
        decoder.wake(tokens[np.arange(B), [3, 0, 0]])
        assert_expects(decoder, [4, 1, 1], opening)


def test_logits_that_do_not_fit_are_refused():
    """Those that are given, and those that are asked for; nothing changes."""
    decoder, state = sleepnet.Decoder(params(TINY), newborn(TINY), config=TINY), newborn(TINY)
    wrong = np.zeros((B, TINY.vocab_size + 1))
    for name, call in (
        ("logits_BY", lambda: decoder.with_state(state, logits_BY=wrong)),
        ("opening_BY", lambda: decoder.rewind([0] * B, opening_BY=wrong)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must have shape \(3, 13\); got \(3, 14\)"):
            call()
    for wrong in ("none", "first"):
        with pytest.raises(ValueError, match=f"logits must be 'all' or 'last'; got '{wrong}'"):
            decoder.read(stream()[:, 0], logits=wrong)
    assert not decoder.length_B.any() and decoder.logits_BY is None


def test_pieces_and_points_to_rewind_to_that_do_not_fit_are_refused():
    """And nothing changes; what fits is `wake`, and not having read."""
    config = dataclasses.replace(TINY, window=600)  # longer than a piece
    decoder = sleepnet.Decoder(params(config), newborn(config), config=config)
    with pytest.raises(ValueError, match="a piece has at most 512 tokens; got 513"):
        decoder.read(np.zeros((B, 513), np.int32))
    for wrong in ([3, 0, 0], [-1, 0, 0], [1, 2]):
        with pytest.raises(ValueError, match=r"length_B must lie in 0..\[0 0 0\]; got"):
            decoder.rewind(wrong)
    with pytest.raises(ValueError, match=r"tokens_BL must have shape \(3, 600\); got \(3, 6\)"):
        decoder.with_state(newborn(config), tokens_BL=stream()[:, 0])
    tokens = stream()[:, 0]
    lengths = np.array([5, 2, 6]), np.array([1, 2, 4])
    states = [
        sleepnet.wake(params(config), newborn(config), tokens, config=config, length_B=length_B)[1]
        for length_B in lengths
    ]
    decoder.read(tokens, length_B=lengths[0])
    assert_agree(decoder.state, states[0])
    decoder.rewind(lengths[1])
    assert_agree(decoder.state, states[1])
    np.testing.assert_array_equal(decoder.length_B, lengths[1])


def interrupted(call):
    def and_then_ctrl_c(*arguments, **options):
        call(*arguments, **options)
        raise KeyboardInterrupt

    return and_then_ctrl_c


def test_another_configs_state_is_refused():
    wider = dataclasses.replace(TINY, window=2 * L)
    with pytest.raises(ValueError, match="window"):
        sleepnet.Decoder(params(TINY), newborn(TINY), config=wider)


def test_one_program_reads_all_tokens():
    """Compiled once, whatever the tokens, fill levels and sleeps."""
    config = dataclasses.replace(TINY, vocab_size=HARD.vocab_size + 1)  # of this test alone
    before = decoding.step._cache_size()
    decoder = sleepnet.Decoder(
        sleepnet.init_params(config, jax.random.key(0)),
        sleepnet.init_state(config, B), config=config,
    )  # fmt: skip
    for _ in range(2):
        for token in range(L):
            decoder.wake(np.full(B, token))
        decoder.sleep()
    assert decoding.step._cache_size() == before + 1


@pytest.mark.optimized
def test_a_token_is_written_in_place():
    """All that a token changes is donated and nothing as large as one layer's keys is made beside
    it: a longer window costs no memory but its own. (In bfloat16 XLA for CPU widens what it
    reads.)"""
    config = sleepnet.ModelConfig(
        vocab_size=64, pattern="G[AGAGAG]A", d_model=64, num_heads=2, window=1024
    )
    shapes = jax.eval_shape(
        lambda: (
            decoding.unstack_params(sleepnet.init_params(config, jax.random.key(0))),
            *decoding.halves(decoding.unstack_state(sleepnet.init_state(config, 2))),
        )
    )
    tokens = jax.ShapeDtypeStruct((2, 1), np.int32)
    memory = decoding.step.lower(*shapes, tokens, config=config).compile().memory_analysis()
    written_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes[2]))
    one_layers_keys = 2 * config.window * config.d_model * np.dtype(np.float32).itemsize
    assert memory.alias_size_in_bytes >= written_bytes
    assert memory.temp_size_in_bytes < one_layers_keys
