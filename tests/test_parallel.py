"""Sleep over eight virtual devices is sleep on one: along the window and along sessions."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import GRADIENTS, assert_agree, assert_identical, rows
from minds import CONFIGS, HARD, SLIDING, TINY, params

import sleepnet
from sleepnet.cycle import cache, parallel
from sleepnet.cycle.sleep import sleep_inputs
from sleepnet.evaluation.programs import Program
from sleepnet.nn import flops

# Three devices hold 10, 10 and 9 tokens; eight hold 4, and the last 1.
WIDE = {"hard": HARD, "sliding": SLIDING}
WIDE = {name: dataclasses.replace(config, window=29) for name, config in WIDE.items()}
both = pytest.mark.parametrize("config", WIDE.values(), ids=WIDE)


@functools.cache
def lived(config, batch=3):
    """Minds that slept once and woke again, to different places of their window."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, config.vocab_size, (2, batch, config.window))
    lengths = np.resize(np.array([config.window, config.window // 3, 0], np.int32), batch)
    state = sleepnet.init_state(config, batch)
    state = sleepnet.sleep_from_tokens(params(config), state, first, config=config)
    _, awake = sleepnet.wake(params(config), state, second, config=config, length_B=lengths)
    return state, second, lengths, awake


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("hard", 8),
        ("sliding", 3),
        pytest.param("hard", 3, marks=pytest.mark.slow),
        pytest.param("sliding", 8, marks=pytest.mark.slow),
    ],
)
def test_a_window_over_devices_is_a_window(name, devices):
    """Prelude, repeated core and coda, both evictions, ragged rows, lengths that the devices do
    not divide; after a wake pass and from the tokens; rows that stay awake stay bit for bit."""
    config = WIDE[name]
    state, tokens, lengths, awake = lived(config)
    chosen = dict(config=config, devices=devices, axis="window")
    stay = np.array([True, True, False])
    actual = parallel.sleep(params(config), awake, rows_B=stay, **chosen)
    assert_agree(actual, sleepnet.sleep(params(config), awake, config=config, rows_B=stay))
    assert_identical(actual.window.features_BLD[2], awake.window.features_BLD[2])
    actual = parallel.sleep_from_tokens(params(config), state, tokens, length_B=lengths, **chosen)
    expected = sleepnet.sleep_from_tokens(
        params(config), state, tokens, config=config, length_B=lengths
    )
    assert_agree(actual, expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sessions_over_devices_are_sessions(config):
    """Seven minds over four devices, each slept for alone: to 1e-6 the same as all on one."""
    state, tokens, lengths, awake = lived(config, batch=7)
    chosen = dict(config=config, devices=4, axis="sessions")
    actual = parallel.sleep(params(config), awake, **chosen)
    assert_agree(actual, sleepnet.sleep(params(config), awake, config=config), tol=1e-6)
    actual = parallel.sleep_from_tokens(params(config), state, tokens, length_B=lengths, **chosen)
    expected = sleepnet.sleep_from_tokens(
        params(config), state, tokens, config=config, length_B=lengths
    )
    assert_agree(actual, expected, tol=1e-6)


@pytest.mark.optimized
def test_equal_rows_per_device_give_equal_bits():
    """Six sessions, three to a device, are bit for bit those of three alone; and twice the same."""
    *_, six = lived(TINY, batch=6)
    slept = parallel.sleep(params(TINY), six, config=TINY, devices=2, axis="sessions")
    again = parallel.sleep(params(TINY), six, config=TINY, devices=2, axis="sessions")
    assert_identical(again, slept)
    axes = cache.batch_axes(six)
    three = jax.tree.map(lambda x, axis: rows(x, range(3), axis), six, axes)
    alone = sleepnet.sleep(params(TINY), three, config=TINY)
    assert_identical(jax.tree.map(lambda x, axis: rows(x, range(3), axis), slept, axes), alone)


def test_the_window_axis_gives_the_same_bits_every_time():
    """Run to run; and the state comes home to the device where it was."""
    config = WIDE["hard"]
    *_, awake = lived(config)
    first, second = (
        parallel.sleep(params(config), awake, config=config, devices=8, axis="window")
        for _ in range(2)
    )
    assert_identical(first, second)
    assert {x.sharding for x in jax.tree.leaves(first)} == {awake.window.length_B.sharding}


@pytest.mark.slow
@both
def test_gradients_pass_through_a_spread_sleep(config):
    """jax.grad outside pmap, by every parameter."""
    *_, awake = lived(config)

    def total(params, sleep):
        slept = sleep(params, awake, config=config)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(slept.fast_weights))

    spread = functools.partial(parallel.sleep, devices=3, axis="window")
    expected = jax.grad(total)(params(config), sleepnet.sleep)
    assert_agree(jax.grad(total)(params(config), spread), expected, GRADIENTS)


def test_one_device_of_several_sleeps_there_and_the_minds_come_home(monkeypatch):
    """It may be busy elsewhere: the device on which the state lies does nothing."""
    devices = jax.local_devices()
    state, tokens, _, awake = lived(TINY)
    expected = sleepnet.sleep(params(TINY), awake, config=TINY)
    ingested = sleepnet.sleep_from_tokens(params(TINY), state, tokens, config=TINY)
    slept_on = []
    for name in ("sleep_on_one", "sleep_from_tokens_on_one"):
        sleep = getattr(parallel, name)

        def spy(*args, sleep=sleep, **options):
            slept = sleep(*args, **options)
            slept_on.extend(x.devices() for x in jax.tree.leaves(slept))
            return slept

        monkeypatch.setattr(parallel, name, spy)
    slept = parallel.sleep(params(TINY), awake, config=TINY, devices=devices[3:4])
    read = parallel.sleep_from_tokens(
        params(TINY), state, tokens, config=TINY, devices=devices[3:4]
    )
    assert all(on == {devices[3]} for on in slept_on) and slept_on
    for actual, wanted in ((slept, expected), (read, ingested)):
        assert_identical(actual, wanted)
        assert {x.sharding for x in jax.tree.leaves(actual)} == {awake.window.length_B.sharding}


@pytest.mark.parametrize("chosen", [dict(devices=1), dict(devices=3, axis="window"),
                                    dict(devices=3, axis="sessions")], ids=str)  # fmt: skip
def test_minds_come_home_to_whatever_device_they_were_on(chosen):
    """Also where their lengths are NumPy's."""
    home = jax.local_devices()[5]
    *_, awake = lived(TINY)
    there = jax.device_put(awake, home)
    window = dataclasses.replace(there.window, length_B=np.asarray(awake.window.length_B))
    there = dataclasses.replace(there, window=window)
    there_params = jax.device_put(params(TINY), home)
    slept = parallel.sleep(there_params, there, config=TINY, **chosen)
    assert {device for x in jax.tree.leaves(slept) for device in x.devices()} == {home}
    assert_agree(slept, sleepnet.sleep(params(TINY), awake, config=TINY))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_parameters_that_were_sent_are_sent_no_more(monkeypatch, devices, rows):
    """Not a byte of them, and the sleep is the same."""
    state = lived(TINY, rows)[-1]
    expected = parallel.sleep(params(TINY), state, config=TINY, devices=devices)
    sent = parallel.send(params(TINY), config=TINY, rows=rows, devices=devices)
    there = {x.unsafe_buffer_pointer() for x in buffers(sent)}
    put, again = jax.device_put, []

    def spy(tree, where):
        copy = put(tree, where)
        params_of = copy[0] if isinstance(copy, tuple) else copy
        if isinstance(params_of, dict) and params_of.keys() == sent.keys():
            again.extend(buffers(params_of))
        return copy

    monkeypatch.setattr(jax, "device_put", spy)
    assert_identical(parallel.sleep(sent, state, config=TINY, devices=devices), expected)
    assert again and {x.unsafe_buffer_pointer() for x in again} == there


def buffers(tree):
    return [shard.data for x in jax.tree.leaves(tree) for shard in x.addressable_shards]


@pytest.fixture(autouse=True)
def nothing_was_said_yet():
    parallel._warn_once.cache_clear()


def test_fewer_devices_than_were_asked_for_are_worth_one_warning(caplog):
    """For each plan, however often it sleeps."""
    for _ in range(3):
        state = sleepnet.init_state(TINY, 1)
        parallel.sleep(params(TINY), state, config=TINY, passes=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def logged(caplog, batch, **chosen):
    """What the log says of a sleep whose passes need no devices."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=parallel.__name__):
        parallel.sleep(
            params(TINY), sleepnet.init_state(TINY, batch), config=TINY, passes=1, **chosen
        )
    (record,) = caplog.records
    return record.levelname, record.message


def test_the_axis_is_chosen_by_shape_and_logged(caplog):
    """Sessions as soon as each device gets one; fewer devices where the halo does not fit."""
    assert logged(caplog, 8)[1].endswith("over 8 of 8 devices along sessions")
    level, message = logged(caplog, 1)  # windows of 6 tokens, a halo of 3
    assert (level, message[-39:]) == ("WARNING", "tokens over 2 of 8 devices along window")
    assert logged(caplog, 1, devices=2)[0] == "INFO"


def test_the_kernel_for_one_device_is_left_aside_with_a_word(caplog):
    """Along the window XLA's form runs in place of the TPU kernel; the log says so."""
    config = dataclasses.replace(TINY, backend="pallas", chunk=16)
    _, _, _, state = lived(TINY)
    with caplog.at_level("WARNING", logger=parallel.__name__):
        spread = parallel.sleep(params(TINY), state, config=config, devices=2, axis="window")
    assert "backend='pallas' is for one device" in caplog.text
    expected = sleepnet.sleep(params(TINY), state, config=TINY)
    assert_agree(spread.fast_weights, expected.fast_weights)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dict(devices=9), "devices must be an integer in 1..8 .*; got 9; the nearest is 8"),
        (dict(devices=0), "devices must be .* cpu devices.*; got 0; the nearest is 1"),
        (dict(devices=[]), "among jax.local_devices"),
        (dict(axis="windows"), "allowed: window, sessions; the nearest is 'window'"),
        (dict(passes=0), "1 or more; got 0"),
    ],
)
def test_bad_choices_are_named(chosen, message):
    """Before anything compiles."""
    with pytest.raises(ValueError, match=message):
        parallel.sleep(params(TINY), sleepnet.init_state(TINY, 1), config=TINY, **chosen)


SHARED = sleepnet.ModelConfig(
    vocab_size=16, pattern="AG", d_model=64, num_heads=2, window=512, passes=2, chunk=64
)


def compiled_sleep(devices):
    """One pass of the core over one window of 512 tokens."""
    state = sleepnet.init_state(SHARED, 1)
    if devices == 1:
        sleep = functools.partial(sleepnet.sleep, config=SHARED)
        return Program(jax.jit(sleep).lower(params(SHARED), state).compile())
    spread = parallel.refine_over_window(SHARED, 2, tuple(jax.local_devices()[:devices]))
    features = jnp.zeros((devices, 1, 512 // devices, 64))
    return Program(spread.lower(params(SHARED), sleep_inputs(state), features).compile())


def test_devices_exchange_maps_halo_keys_and_values_and_nothing_else():
    """Two all-gathers and one permute per pass of "AG": in bytes, eight maps (M, R) of two heads,
    the window's keys and values, and three inputs of the convolution."""
    maps, keys_and_values = 4 * 8 * 2 * 32 * 64, 4 * 2 * 512 * 64
    halo = 4 * 3 * 3 * 64
    assert sorted(compiled_sleep(8).collectives) == sorted(
        [("all-gather", maps), ("all-gather", keys_and_values), ("collective-permute", halo)]
    )


def test_the_rest_of_a_sleep_is_shared_evenly():
    """Products other than the rule's: per device of eight at most 1.1 / 8 of one device's. The
    last pass computes attention's output and the delta block up to its last write."""
    rule = 2 * 512 * (6 * 32 * 32 + 64 * 8 * 32 + 2 / 3 * 64**2)
    alone, eighth = compiled_sleep(1).dot_flops, compiled_sleep(8).dot_flops
    spread_rule = 1.8 * rule / 8  # as test_device_scan allows
    assert alone > 3 * rule
    assert eighth - spread_rule <= 1.1 / 8 * (alone - rule)
    assert flops.part_flops(SHARED, "core", 512) >= alone
