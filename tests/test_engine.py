"""What a session of `Engine` may rely on, whoever is beside it."""

import collections
import contextlib
import dataclasses
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import waiting

import sleepnet
from sleepnet.config import ConfigError
from sleepnet.cycle import slices as nap_module
from sleepnet.inference import engine as engine_module
from sleepnet.inference import slots as slots_module
from sleepnet.inference.engine import (
    CANCELLED,
    FAILED,
    LENGTH,
    STOP,
    Drawn,
    Ended,
    Engine,
    EngineFull,
    Limits,
)
from sleepnet.inference.sampling import Sampling, sample, stack
from sleepnet.inference.snapshot import Snapshot
from sleepnet.nn.fsdp import devices_of
from sleepnet.training import sharding

CONFIG = sleepnet.ModelConfig(
    vocab_size=16, pattern="G[AG]G", d_model=16, num_heads=2, window=8, passes=3,
    init_embedding_std=1.0,
)  # fmt: skip
# Engines of few shapes, since each compiles programs of its own.
SLOTS = 4
BY_TOKENS = {"slots": SLOTS, "work": 1}  # slices and pieces of one token
BY_PAIRS = {"slots": 2, "work": 4, "group": 2}  # of two tokens of two rows
BY_THREES = {"slots": SLOTS, "work": 50, "group": 3}  # of a window of three rows, twice a step
ARRAYS = {"state": None, "logits_Y": None, "opening_Y": None}  # of a mind


@pytest.fixture(scope="module")
def params():
    return sleepnet.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def engine(params):
    """For tests that leave it without sessions."""
    return Engine(params, config=CONFIG, slots=SLOTS)


@pytest.fixture
def limited(an_engine_with_limits):
    """Whose sessions have all ended."""
    for _ in an_engine_with_limits.run():
        pass
    return an_engine_with_limits


@pytest.fixture(scope="module")
def an_engine_with_limits(params):
    limits = Limits(waiting=2, prompt=30, new_tokens=40)
    return Engine(params, config=CONFIG, slots=SLOTS, limits=limits)


def prompt(seed, size):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, size)


def run(engine, **submissions):
    """name -> (tokens drawn, Ended) of sessions that are all submitted at once."""
    keys = {
        engine.submit(tokens, **options): name for name, (tokens, options) in submissions.items()
    }
    drawn, ended = {name: [] for name in submissions}, {}
    for event in engine.run():
        if isinstance(event, Drawn):
            drawn[keys[event.key]].append(event.token)
        else:
            ended[keys[event.key]] = event
    return {name: (drawn[name], ended[name]) for name in submissions}


def alone(engine, tokens, **options):
    return run(engine, it=(tokens, options))["it"]


def assert_same_minds(one, other):
    assert dataclasses.replace(one, **ARRAYS) == dataclasses.replace(other, **ARRAYS)
    arrays = ((x.state, x.logits_Y, x.opening_Y) for x in (one, other))
    for a, b in zip(*map(jax.tree.leaves, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def snapshot_of(state):
    return Snapshot(state=state, policy=sleepnet.FixedPasses(3), sampling=Sampling())


def by_hand(params, config, tokens, count, sampling):
    """One mind, read token by token with `wake`, that sleeps at every boundary."""
    state, unread, drawn = sleepnet.init_state(config, 1), list(tokens), []
    while unread:
        if state.window.length_B[0] == config.window:
            state = sleepnet.sleep(params, state, config=config)
        logits, state = sleepnet.wake(
            params, state, np.array([[unread.pop(0)]]), config=config, logits="last"
        )
        if not unread and len(drawn) < count:
            draw = np.array([len(tokens) + len(drawn)], np.uint32)
            draw = sample(logits, draw, stack([sampling]))
            drawn.append(int(draw[0]))
            unread.append(drawn[-1])
    return drawn, state


@pytest.mark.parametrize(
    "changes",
    [{}, {"eviction": "sliding", "conv_carry": True, "pattern": "AG"}, {"passes": 1}],
    ids=["with prelude and coda", "sliding", "no sleep but eviction"],
)
def test_a_session_draws_what_its_mind_would(params, changes):
    """And leaves the mind that has read all of it."""
    config = dataclasses.replace(CONFIG, **changes)
    params = params if not changes else sleepnet.init_params(config, jax.random.key(1))
    engine = Engine(params, config=config, slots=SLOTS)
    sampling = Sampling(temperature=0.9, top_k=12, seed=5)
    drawn, ended = alone(engine, prompt(0, 21), max_new_tokens=20, sampling=sampling, keep=True)
    expected, state = by_hand(params, config, prompt(0, 21), 20, sampling)
    assert drawn == expected and ended.reason == LENGTH
    for a, b in zip(jax.tree.leaves(ended.snapshot.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("seed", "sessions", "sizes"),
    [
        pytest.param(0, 12, {"slots": SLOTS}, marks=pytest.mark.optimized),
        (1, 12, BY_PAIRS),
        pytest.param(2, 12, BY_THREES, marks=pytest.mark.optimized),
        pytest.param(3, 64, {"slots": SLOTS}, marks=pytest.mark.slow),
        pytest.param(1, 12, {"slots": SLOTS, "work": 7, "group": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_session_is_bit_equal_to_itself_alone(params, seed, sessions, sizes):
    """Sessions of random lengths that join at random steps, are cancelled, and sleep when each
    must, alone or in groups: tokens drawn, and the minds that stay."""
    engine = Engine(params, config=CONFIG, **sizes)
    rng = np.random.default_rng(seed)
    plans = {}
    for i in range(sessions):
        options = {
            "max_new_tokens": int(rng.integers(0, 25)),
            "sampling": Sampling(temperature=float(rng.choice([0.0, 1.0])), seed=i),
            "keep": True,
        }
        plans[i] = (prompt(100 * seed + i, int(rng.integers(1, 40))), options)
    waiting, keys, drawn, ended = list(plans), {}, {i: [] for i in plans}, {}
    cancelled = set(rng.choice(sessions, sessions // 4, replace=False).tolist())
    while waiting or engine.busy:
        if waiting and (rng.random() < 0.3 or not engine.busy):
            i = waiting.pop()
            keys[engine.submit(plans[i][0], **plans[i][1])] = i
        for key, i in keys.items():
            if i in cancelled and i not in ended and rng.random() < 0.1:
                engine.cancel(key)
        for event in engine.step():
            if isinstance(event, Drawn):
                drawn[keys[event.key]].append(event.token)
            else:
                ended[keys[event.key]] = event
    for i, (tokens, options) in plans.items():
        expected, by_itself = alone(engine, tokens, **options)
        assert drawn[i] == expected[: len(drawn[i])]
        if ended[i].reason != CANCELLED:
            assert len(drawn[i]) == len(expected)
            assert_same_minds(ended[i].snapshot, by_itself.snapshot)


@pytest.mark.parametrize(
    "sizes",
    [
        {"slots": 1},
        pytest.param({"slots": 3, "work": 5, "group": 2}, marks=pytest.mark.slow),
        pytest.param({"slots": 64, "work": 64, "group": 16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_slots_of_another_shape_change_no_more_than_roundoff(params, engine, sizes):
    """Ten sleeps: states and logits within 5e-6 of their largest entry (measured: 4e-7)."""
    options = {"max_new_tokens": 40, "sampling": Sampling(seed=8), "keep": True}
    other = Engine(params, config=CONFIG, **sizes)
    drawn, expected = (alone(e, prompt(6, 45), **options) for e in (other, engine))
    assert drawn[0] == expected[0] and drawn[1].snapshot.sleeps == expected[1].snapshot.sleeps == 10
    minds = ((end.snapshot.state, end.snapshot.logits_Y) for _, end in (drawn, expected))
    for a, b in zip(*map(jax.tree.leaves, minds), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * max(1, np.abs(b).max()))


def test_a_mind_that_was_kept_goes_on_bit_equal(engine):
    """As if all had been read in one submission, where the pieces are the same."""
    first, second = prompt(1, 2 * CONFIG.window), prompt(2, 5)
    options = {"max_new_tokens": 12, "sampling": Sampling(seed=3)}
    _, read = alone(engine, first, max_new_tokens=0, keep=True)
    went_on = alone(engine, second, snapshot=read.snapshot, **options)
    assert went_on[0] == alone(engine, np.concatenate([first, second]), **options)[0]


def test_minds_move_between_a_session_and_the_engine(params, engine, tmp_path):
    """There and back, and through a file: what is drawn is what the session draws by itself."""
    session = sleepnet.Session(params, config=CONFIG, sampling=Sampling(seed=4))
    session.feed(prompt(12, 19))
    by_itself = session.fork()
    by_itself.feed(prompt(13, 7))
    options = {"max_new_tokens": 6, "keep": True}
    drawn, ended = alone(engine, prompt(13, 7), snapshot=session.snapshot, **options)
    assert drawn == list(by_itself.generate(6))
    back = sleepnet.Session.from_snapshot(params, ended.snapshot, config=CONFIG)
    back.save(tmp_path / "mind")
    back = sleepnet.Session.load(tmp_path / "mind", params)
    assert (back.position, back.sleeps, back.tokens) == (
        by_itself.position, by_itself.sleeps, by_itself.tokens
    )  # fmt: skip
    assert back.snapshot.preceding == by_itself.snapshot.preceding != session.snapshot.preceding
    assert list(back.generate(20)) == list(by_itself.generate(20))
    back.rewind(back.position - len(back.tokens))  # to its last sleep
    by_itself.rewind(by_itself.position - len(by_itself.tokens))
    assert list(back.generate(5)) == list(by_itself.generate(5))


def test_neighbours_draw_a_token_in_every_step_in_which_another_sleeps(params):
    """However little work a step may do."""
    engine = Engine(params, config=CONFIG, **BY_TOKENS)
    sleeper = engine.submit(prompt(3, 4 * CONFIG.window), max_new_tokens=1)
    while not engine.load.asleep:
        engine.step()
    speaker = engine.submit(prompt(4, 1), max_new_tokens=CONFIG.window)
    events = [engine.step() for _ in range(CONFIG.window)]
    assert all(any(event.key == speaker for event in step) for step in events)
    assert engine.load.asleep == 1
    assert [event.key for event in engine.run()] == [sleeper] * 2


def test_who_speaks_sleeps_before_who_reads(params):
    """However little work a step may do, and beside however many readers: between two of its draws
    lie one sleep of a neighbour, which had begun, its own, and two steps to hear of them."""
    engine = Engine(params, config=CONFIG, **BY_TOKENS)
    for i in range(SLOTS - 1):
        engine.submit(prompt(i, 3000), max_new_tokens=0)
    speaker = engine.submit(prompt(99, 3), max_new_tokens=4 * CONFIG.window)
    steps, drawn_in = 0, []
    while len(drawn_in) < 4 * CONFIG.window:
        drawn_in += [steps for event in engine.step() if event.key == speaker]
        steps += 1
    one_sleep = 3 * CONFIG.window  # two passes of the core and one of the coda
    assert one_sleep <= max(np.diff(drawn_in)) <= 2 * one_sleep + 2


def test_who_reads_is_not_kept_from_sleep_for_ever(params):
    """By speakers who leave no time: of `slots` + 1 groups one at least is the readers'."""
    engine = Engine(params, config=CONFIG, **BY_TOKENS)
    speakers = [engine.submit(prompt(i, 1), max_new_tokens=40 * CONFIG.window) for i in range(3)]
    reader = engine.submit(prompt(9, 3 * CONFIG.window), max_new_tokens=0)
    ended = next(event for event in engine.run() if isinstance(event, Ended))
    assert ended == (reader, LENGTH, None, None)
    for key in speakers:
        engine.cancel(key)
    assert len(engine.step()) == 3


@pytest.mark.parametrize(
    "sizes",
    [
        BY_TOKENS,
        {"slots": SLOTS},
        BY_PAIRS,
        BY_THREES,
        pytest.param({"slots": SLOTS, "work": 5, "group": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_does_no_more_work_than_it_may(params, monkeypatch, sizes):
    """Tokens read in pieces, and tokens slept on, of all rows together; and it does not idle."""
    engine, done = Engine(params, config=CONFIG, **sizes), collections.Counter()
    read_piece, sleep = slots_module.Slots.read_piece, engine_module.continue_sleep

    def reads(slots, rows, tokens_QT, length_Q, *rest):
        done["read"] += int(length_Q.sum())
        return read_piece(slots, rows, tokens_QT, length_Q, *rest)

    def sleeps(params, progress, *, tokens):
        done["slept on"] += tokens * progress.window.length_B.shape[0]
        return sleep(params, progress, tokens=tokens)

    monkeypatch.setattr(slots_module.Slots, "read_piece", reads)
    monkeypatch.setattr(engine_module, "continue_sleep", sleeps)
    for i in range(SLOTS):
        engine.submit(prompt(i, 5 * CONFIG.window), max_new_tokens=4)
    most = collections.Counter()
    while engine.busy:
        done.clear()
        engine.step()
        most |= done
    work = sizes.get("work", SLOTS * CONFIG.passes)
    assert max(most.values()) <= work and min(most["read"], most["slept on"]) >= work / 2


def test_an_engine_works_where_nan_is_an_error(engine):
    """Under JAX_DEBUG_NANS=1: it makes none on the way, however its rows draw."""
    kinds = {"cut": Sampling(top_k=3, top_p=0.5), "greedy": Sampling(temperature=0)}
    options = {"max_new_tokens": 3}
    with jax.debug_nans(True):
        ended = run(engine, **{
            name: (prompt(0, CONFIG.window), options | {"sampling": kind})
            for name, kind in kinds.items()
        })  # fmt: skip
    assert [one.reason for _, one in ended.values()] == [LENGTH, LENGTH]


def test_what_sleeps_in_an_engine_is_not_hashed(engine, monkeypatch):
    """The rows that it commits are those that it took: to compare them would cost it time."""

    def hashed(state):
        raise AssertionError("an engine hashes a state")

    monkeypatch.setattr(nap_module, "_hash_rows", hashed)
    _, ended = alone(engine, prompt(0, CONFIG.window + 1), max_new_tokens=0, keep=True)
    assert (ended.reason, ended.snapshot.sleeps) == (LENGTH, 1)


def test_run_waits_for_those_who_sleep_elsewhere(params, monkeypatch):
    """It does not ask over and over whether they have woken."""

    class LightSleeper(engine_module._OnDevices):
        asked, waited_for = 0, False

        def go_on(self):
            self.asked += 1
            assert self.waited_for or self.asked < 30
            return super().go_on() if self.waited_for else None

        def wait(self):
            super().wait()
            self.waited_for = True

    engine = Engine(params, config=CONFIG, slots=SLOTS, devices=2)
    monkeypatch.setattr(engine_module, "_OnDevices", LightSleeper)
    assert alone(engine, prompt(1, 20), max_new_tokens=3)[1].reason == LENGTH


def test_devices_of_their_own_sleep_for_the_rows(params, engine):
    """Under pmap; what is drawn is the same."""
    with_devices = Engine(params, config=CONFIG, slots=SLOTS, devices=jax.local_devices()[1:3])
    plans = {
        name: (prompt(i, 20), {"max_new_tokens": 15, "sampling": Sampling(seed=i), "keep": True})
        for i, name in enumerate("abcdef")
    }
    here, there = run(engine, **plans), run(with_devices, **plans)
    for name in plans:
        assert there[name][0] == here[name][0]
        for a, b in zip(
            *(jax.tree.leaves(x[name][1].snapshot.state) for x in (here, there)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.optimized
def test_a_row_that_fails_ends_alone(engine):
    """Bit for bit: the others draw what they draw without it."""
    sick = snapshot_of(
        jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x,
            sleepnet.init_state(CONFIG, 1),
        )
    )
    plan = (prompt(5, 11), {"max_new_tokens": 20, "sampling": Sampling(seed=1)})
    both = run(engine, sick=(prompt(6, 3), {"max_new_tokens": 9, "snapshot": sick}), well=plan)
    assert both["sick"][1].reason == FAILED and not both["sick"][0]
    assert "logits are not numbers" in both["sick"][1].error
    assert both["well"] == (alone(engine, plan[0], **plan[1])[0], both["well"][1])
    assert both["well"][1].reason == LENGTH


def test_a_stop_token_ends_it_and_is_not_given_out(engine):
    options = {"max_new_tokens": 20, "sampling": Sampling(seed=2)}
    drawn, _ = alone(engine, prompt(7, 3), **options)
    stop = drawn[5]
    until, ended = alone(engine, prompt(7, 3), stop=[stop], keep=True, **options)
    assert until == drawn[: drawn.index(stop)] and ended.reason == STOP
    assert ended.snapshot.position == 3 + len(until)


def test_who_comes_first_is_served_first_and_long_prompts_hold_up_nobody(params):
    """Slots are given in the order of submission; readers take turns, piece by piece."""
    engine = Engine(params, config=CONFIG, **BY_TOKENS)
    long = [engine.submit(prompt(8, 60), max_new_tokens=1) for _ in range(SLOTS - 1)]
    short = engine.submit(prompt(9, 6), max_new_tokens=1)
    last = engine.submit(prompt(9, 3), max_new_tokens=1)
    order = [event.key for event in engine.run() if isinstance(event, Ended)]
    assert order[:2] == [short, last] and set(order[2:]) == set(long)


@pytest.mark.parametrize("steps", [0, 1, 5, 12])
def test_a_session_can_be_cancelled_in_whatever_it_does(engine, steps):
    """Waiting, reading, asleep or speaking, it ends at the next step; its slot is free again."""
    keys = [engine.submit(prompt(i, 12), max_new_tokens=30) for i in range(SLOTS + 1)]
    for _ in range(steps):
        engine.step()
    for key in keys:
        engine.cancel(key)
    assert engine.step() == [Ended(key, CANCELLED) for key in keys]
    assert not engine.busy and sum(engine.load) == 0
    with pytest.raises(KeyError, match="has ended, or never was"):
        engine.cancel(keys[0])


@pytest.mark.parametrize("leave", [1, 2], ids=["one of a group", "the whole group"])
@pytest.mark.parametrize("devices", [None, 2], ids=["in slices", "elsewhere"])
@pytest.mark.optimized
def test_who_is_cancelled_asleep_ends_at_the_next_step(params, devices, leave):
    """Before it draws. Its slot is another's at once, and those who sleep beside it sleep on: both
    draw what they draw alone, bit for bit."""
    engine = Engine(params, config=CONFIG, **BY_PAIRS, devices=devices)
    plan = (prompt(3, 2 * CONFIG.window), {"max_new_tokens": 9, "sampling": Sampling(seed=1)})
    expected = alone(engine, plan[0], **plan[1])[0]
    keys = [engine.submit(plan[0], **plan[1]) for _ in range(2)]
    while engine.load.asleep < 2:
        engine.step()
    left, stay = keys[:leave], keys[leave:]
    stay += [engine.submit(plan[0], **plan[1]) for _ in left]
    for key in left:
        engine.cancel(key)
    assert engine.step()[:leave] == [Ended(key, CANCELLED) for key in left]
    assert engine.load.waiting == 0
    drawn = collections.defaultdict(list)
    for event in engine.run():
        if isinstance(event, Drawn):
            drawn[event.key].append(event.token)
    assert drawn == dict.fromkeys(stay, expected)


# Sessions that read, speak, sleep and wait, while there is work for all of an engine's code.
COMPANY = {
    "reads": (prompt(1, 19), {"max_new_tokens": 4, "keep": True}),
    "speaks": (prompt(2, 3), {"max_new_tokens": 9, "sampling": Sampling(seed=1)}),
    "waits": (prompt(3, 9), {"max_new_tokens": 3}),
    "leaves": (prompt(4, 9), {"max_new_tokens": 3}),
}


@pytest.fixture(scope="module")
def small(params):
    """An engine for `COMPANY`, and what each draws that stays."""
    engine = Engine(params, config=CONFIG, **BY_PAIRS)
    return engine, {name: alone(engine, tokens, **o)[0] for name, (tokens, o) in COMPANY.items()}


def company_in(engine, interrupt):
    """name -> (tokens drawn, [Ended ..]) of `COMPANY`, with an interrupt after which it goes on."""
    names = {engine.submit(tokens, **o): name for name, (tokens, o) in COMPANY.items()}
    (leaves,) = (key for key, name in names.items() if name == "leaves")
    engine.cancel(leaves)
    heard = {name: ([], []) for name in COMPANY}

    def listen():
        for event in engine.run():
            drawn, ended = heard[names[event.key]]
            if isinstance(event, Drawn):
                drawn.append(event.token)
            else:
                ended.append(event)

    try:
        interrupt(listen)
    except KeyboardInterrupt:
        listen()
    assert not engine.busy and sum(engine.load) == 0
    return heard


class Interrupt:
    """Calls, and raises KeyboardInterrupt before the n-th line of the engine's code."""

    FILES = (engine_module.__file__, slots_module.__file__)

    def __init__(self, n):
        self.n, self.lines = n, 0

    def __call__(self, function):
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            function()
        finally:
            sys.settrace(before)

    def _enter(self, frame, *_):
        return self._line if frame.f_code.co_filename in self.FILES else None

    def _line(self, frame, what, _):
        self.lines += what == "line"
        if self.lines == self.n:
            self.lines += 1
            raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 9))]
)
def test_an_interrupt_anywhere_leaves_an_engine_that_goes_on(small, seed):
    """Each session ends once: undisturbed, or failed by the interrupt after the first of what it
    would have drawn. Nothing hangs, and who comes next finds all as ever."""
    engine, expected = small
    count = Interrupt(0)
    company_in(engine, count)
    for n in np.random.default_rng(seed).integers(1, count.lines, 50):
        for name, (drawn, ended) in company_in(engine, Interrupt(n)).items():
            (end,) = ended
            assert drawn == expected[name][: len(drawn)]
            if end.reason == FAILED:
                assert "a step was interrupted" in end.error
            elif end.reason == LENGTH:
                assert len(drawn) == len(expected[name])
    tokens, options = COMPANY["reads"]
    assert alone(engine, tokens, **options)[0] == expected["reads"]


def test_an_interrupt_while_the_device_works_loses_nothing(small, monkeypatch):
    """A step waits for the device most of its time; whoever interrupts it there may go on."""
    engine, expected = small
    patiently, waits = np.asarray, iter(range(1000))

    def impatiently(x, *args, **options):
        if isinstance(x, jax.Array) and next(waits) == 7:
            raise KeyboardInterrupt
        return patiently(x, *args, **options)

    monkeypatch.setattr(np, "asarray", impatiently)
    heard = company_in(engine, lambda listen: listen())
    assert next(waits) > 8
    for name in ("reads", "speaks", "waits"):
        drawn, (end,) = heard[name]
        assert (drawn, end.reason) == (expected[name], LENGTH)


@pytest.mark.parametrize("program", ["_read_one", "_read_piece", "_take", "_put"])
@pytest.mark.parametrize("loses", [False, True], ids=["minds stay", "minds are lost"])
def test_a_program_that_fails_ends_those_it_was_for(small, monkeypatch, program, loses):
    """Or everybody in a slot, if it took their memory with it; the error is in `Ended.error`, and
    the others, and those who come, draw what they would."""
    engine, expected = small
    works, calls = getattr(slots_module, program), []

    def fails(*args, **options):
        calls.append(args)
        if len(calls) != 2:
            return works(*args, **options)
        if loses:
            state = args[0] if program in ("_take", "_put") else args[1]
            jax.tree.map(lambda x: x.delete(), state)
        raise RuntimeError("the device is out of memory")

    monkeypatch.setattr(slots_module, program, fails)
    heard = company_in(engine, lambda listen: listen())
    failed = {name for name, (_, (end,)) in heard.items() if end.reason == FAILED}
    assert failed and len(calls) > 2
    for name, (drawn, (end,)) in heard.items():
        if name in failed:
            assert "RuntimeError: the device is out of memory" in end.error
            assert drawn == expected[name][: len(drawn)]
        elif end.reason == LENGTH:
            assert drawn == expected[name]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([3, 16], {}, r"token id 16 at place 1 .* ids lie in 0\.\.15"),
        ([], {}, r"1 to 30 tokens \(limits.prompt\); got 0"),
        (list(range(16)) * 2, {}, r"1 to 30 tokens \(limits.prompt\); got 32"),
        ([1.5], {}, "integers"),
        ([1], {"max_new_tokens": 41}, r"in 0\.\.40; got 41"),
        ([1], {"max_new_tokens": True}, r"in 0\.\.40; got True"),
        ([1], {"sampling": {"temperature": 0}}, r"must be a Sampling, .*got {'temperature': 0}"),
        ([1], {"stop": 3}, r"a collection of token ids, such as \{3\}; got 3"),
        ([1], {"stop": "ab"}, "got 'ab'"),
        ([1], {"stop": [16]}, r"in 0\.\.15; got 16"),
        ([1], {"snapshot": "reader"}, "must be a Snapshot, .*got 'reader'"),
    ],
)
def test_bad_input_is_refused_and_the_engine_goes_on(limited, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        limited.submit(tokens, **{"max_new_tokens": 3} | options)
    assert not limited.busy
    assert len(alone(limited, [1], max_new_tokens=3)[0]) == 3


def test_a_mind_whose_tokens_are_not_its_windows_is_refused(engine):
    """More than fit, or none told: what it reads next would lie in the wrong place."""
    _, ended = alone(engine, prompt(0, 5), max_new_tokens=0, keep=True)
    for tokens in ((), tuple(range(10))):
        with pytest.raises(ValueError, match="tokens must be the 5 ids"):
            engine.submit(
                [1], max_new_tokens=1, snapshot=dataclasses.replace(ended.snapshot, tokens=tokens)
            )


def test_an_engine_holds_the_parameters_that_a_session_holds(no_garbage):
    """No further copy of them, beside a mind in its one slot."""
    params = sleepnet.init_params(CONFIG, jax.random.key(7))
    session = sleepnet.Session(params, config=CONFIG)
    before, size = (sum(x.nbytes for x in a) for a in (jax.live_arrays(), jax.tree.leaves(params)))
    engine = Engine(params, config=CONFIG, slots=1)
    assert sum(x.nbytes for x in jax.live_arrays()) - before < size / 2
    assert not (engine.busy or session.position)


def test_sizes_and_ids_may_be_integers_of_any_type(engine, params):
    """The same engine, and the same session, as of Python's."""
    typed = Engine(
        params, config=CONFIG, slots=np.int64(SLOTS), passes=np.uint8(CONFIG.passes),
        work=np.int16(SLOTS * CONFIG.passes), group=jnp.int32(1),
        limits=Limits(waiting=np.int64(5), prompt=np.uint8(200), new_tokens=jnp.int32(9)),
    )  # fmt: skip
    tokens = prompt(22, CONFIG.window + 1)
    drawn, ended = alone(
        typed, jnp.asarray(tokens, jnp.uint8), max_new_tokens=np.int16(9), stop=[np.uint8(15)]
    )
    of_engine, also = alone(engine, tokens, max_new_tokens=9, stop=[15])
    assert drawn == of_engine and ended[1:] == also[1:]


def test_parameters_that_are_split_over_devices_are_gathered_on_one(engine, params):
    """As a run with mesh.fsdp leaves them: the same tokens as from whole ones."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.device_put(params, sharding.of_state(mesh, params))
    assert not split["embedding"].is_fully_replicated
    of_split = Engine(split, config=CONFIG, slots=SLOTS)
    plan = (prompt(21, 2 * CONFIG.window), dict(max_new_tokens=9, keep=True))
    drawn, ended = alone(of_split, plan[0], **plan[1])
    assert drawn == alone(engine, plan[0], **plan[1])[0]
    assert len(devices_of(ended.snapshot.state)) == 1


def test_parameters_of_another_config_are_refused(params):
    with pytest.raises(ValueError, match="those of another config"):
        Engine(params, config=dataclasses.replace(CONFIG, d_model=32), slots=1)


def test_a_state_of_another_model_or_of_two_minds_is_refused(engine):
    other = dataclasses.replace(CONFIG, d_model=32)
    for state, message in (
        (sleepnet.init_state(other, 1), "made for another config"),
        (sleepnet.init_state(CONFIG, 2), "one row"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit([1], max_new_tokens=1, snapshot=snapshot_of(state))


@pytest.mark.parametrize(
    "policy", [sleepnet.FixedPasses(2), sleepnet.UntilStill(), sleepnet.WithinSeconds(seconds=1)],
    ids=str,
)  # fmt: skip
def test_a_mind_that_sleeps_in_another_way_is_refused(engine, policy):
    """The engine would not do as its policy says. The message says how to have it go on."""
    snapshot = snapshot_of(sleepnet.init_state(CONFIG, 1))
    other = dataclasses.replace(snapshot, policy=policy)
    with pytest.raises(
        ValueError, match=r"sleeps by .*, and this engine by FixedPasses"
    ) as refusal:
        engine.submit([1], max_new_tokens=1, snapshot=other)
    assert f"sleeps by {policy}" in str(refusal.value)
    assert "dataclasses.replace(snapshot, policy=FixedPasses(passes=3))" in str(refusal.value)
    other = dataclasses.replace(other, policy=sleepnet.FixedPasses(passes=3))
    drawn, _ = alone(engine, [1], max_new_tokens=1, snapshot=other)
    assert drawn == alone(engine, [1], max_new_tokens=1, snapshot=snapshot)[0]


def test_an_engine_of_other_passes_than_its_configs_sleeps_as_often(params):
    """As one of a config with those passes."""
    plan = (prompt(20, 3 * CONFIG.window), dict(max_new_tokens=12, keep=True))
    engines = (
        Engine(params, config=CONFIG, slots=SLOTS, passes=2),
        Engine(params, config=dataclasses.replace(CONFIG, passes=2), slots=SLOTS),
    )
    (drawn, ended), (expected, by_config) = (alone(e, plan[0], **plan[1]) for e in engines)
    assert drawn == expected and ended.snapshot.policy == sleepnet.FixedPasses(2)
    assert_same_minds(ended.snapshot, by_config.snapshot)


def test_a_mind_from_another_device_is_brought_home(params, engine):
    """What it draws is what it draws from here; nothing is compiled, and nobody else is moved."""
    session = sleepnet.Session(params, config=CONFIG)
    session.feed(prompt(12, 5))
    plan = (prompt(13, 7), {"max_new_tokens": 6, "keep": True})
    here = alone(engine, plan[0], snapshot=session.snapshot, **plan[1])
    for device in jax.local_devices()[1:3]:
        elsewhere = dataclasses.replace(
            session.snapshot, state=jax.device_put(session.snapshot.state, device)
        )
        with compiled() as programs:
            there = alone(engine, plan[0], snapshot=elsewhere, **plan[1])
        assert not programs and there[0] == here[0]
        assert_same_minds(there[1].snapshot, here[1].snapshot)


def test_a_mind_that_cannot_be_taken_in_fails_alone(engine):
    """Here because its owner deleted it meanwhile."""
    plan = (prompt(5, 11), {"max_new_tokens": 5})
    lost = snapshot_of(sleepnet.init_state(CONFIG, 1))
    keys = [
        engine.submit(prompt(1, 3), max_new_tokens=1, snapshot=lost),
        engine.submit(*plan[:1], **plan[1]),
    ]
    jax.tree.map(lambda x: x.delete(), lost.state)
    events = list(engine.run())
    (failed,) = (event for event in events if event.key == keys[0])
    assert failed.reason == FAILED and "deleted" in failed.error
    drawn = [event.token for event in events if isinstance(event, Drawn)]
    assert drawn == alone(engine, plan[0], **plan[1])[0]


@pytest.mark.parametrize(
    ("options", "committed"),
    [
        ({"slots": SLOTS}, False),
        (BY_PAIRS, False),
        (BY_PAIRS, True),
        ({"slots": SLOTS, "devices": 1}, False),
        ({"slots": SLOTS, "devices": 2}, False),
        (BY_PAIRS | {"devices": 2}, True),
        *(
            pytest.param(options, committed, marks=pytest.mark.slow)
            for options in ({"slots": 3, "group": 2}, {"slots": 4, "group": 4, "devices": 4})
            for committed in (False, True)
        ),
    ],
    ids=str,
)
def test_nothing_is_compiled_once_an_engine_is_made(params, options, committed):
    """Whether minds are newborn, kept, or from a file; wherever they sleep."""
    if committed:
        params = jax.device_put(params, jax.local_devices()[1])
    engine = Engine(params, config=CONFIG, **options)
    from_file = snapshot_of(jax.tree.map(np.asarray, sleepnet.init_state(CONFIG, 1)))
    with compiled() as programs:
        plan = {"max_new_tokens": 15, "sampling": Sampling(seed=1), "keep": True}
        ended = run(engine, **{name: (prompt(0, 20), plan) for name in "abc"})
        for snapshot in (ended["a"][1].snapshot, from_file):
            alone(engine, prompt(1, 20), snapshot=snapshot, **plan)
    assert not programs


@contextlib.contextmanager
def compiled():
    """How long each program took that is compiled meanwhile, or found in JAX's cache on disk."""
    seconds = []

    def hear(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def test_more_than_may_wait_are_sent_back(limited):
    for _ in range(2):
        limited.submit([1], max_new_tokens=1)
    with pytest.raises(EngineFull, match=r"2 sessions wait .* submit again after a step"):
        limited.submit([1], max_new_tokens=1)
    limited.step()
    limited.submit([1], max_new_tokens=1)
    assert sum(isinstance(event, Ended) for event in limited.run()) >= 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"slots": 0}, "slots must be .* got 0"), ({"slots": 1, "work": 0}, "work must be .* got 0"),
     ({"slots": 1, "passes": sleepnet.UntilStill()}, "passes must be .* got UntilStill"),
     ({"slots": 1, "limits": 3}, "limits must be Limits.* got 3")],
)  # fmt: skip
def test_a_size_that_is_none_is_refused(params, sizes, message):
    with pytest.raises(ConfigError, match=message):
        Engine(params, config=CONFIG, **sizes)


def test_two_threads_do_not_step_at_once(engine, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def admit():
        entered.set()
        assert leave.wait(waiting.PATIENCE)

    monkeypatch.setattr(engine, "_admit", admit)
    thread = threading.Thread(target=engine.step, daemon=True)
    thread.start()
    assert entered.wait(waiting.PATIENCE)
    with pytest.raises(RuntimeError, match="another thread is in a step"):
        engine.step()
    leave.set()
    waiting.join(thread)
    engine.step()
