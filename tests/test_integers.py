"""Lengths, counts, passes, seeds and ids are integers of any type, everywhere, and nothing else."""

import dataclasses
import functools
import json
import typing

import jax
import jax.numpy as jnp
import minds
import numpy as np
import pytest
from agreement import assert_agree, assert_identical
from jax.extend.core import ClosedJaxpr
from minds import HARD, B, L

import sleepnet
from sleepnet import tasks
from sleepnet.config import ConfigError, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.cycle import slices
from sleepnet.evaluation.accuracy import evaluate
from sleepnet.evaluation.likelihood import evaluate_text
from sleepnet.evaluation.streaming import agreement
from sleepnet.experiment import ExperimentConfig
from sleepnet.inference import decoder as decoding
from sleepnet.inference.sampling import stop_ids
from sleepnet.inference.snapshot import Snapshot
from sleepnet.integers import as_integer
from sleepnet.ops import gated_delta
from sleepnet.ops.gated_delta import pallas_tpu
from sleepnet.tasks import DepoConfig, FactsConfig, Rule110Config, TextConfig

SMALL = dataclasses.replace(HARD, pattern="G", passes=2)
PARAMS = minds.params(SMALL)
TASK = DepoConfig(nodes=6, symbols=6, hops=3, queries=3, window=6)
EXPERIMENT = ExperimentConfig(model=SMALL, task=TASK)
TOKENS, LENGTHS = minds.stream()[:, 0], np.array([2, 3, 1], np.int32)

INTEGERS = {
    "int64": np.int64,
    "uint16": np.uint16,
    "an array without axes": functools.partial(np.array, dtype=np.uint32),
    "JAX": functools.partial(jnp.array, dtype=jnp.int32),
}


def others(value):
    """What resembles a number and is not an integer."""
    return [
        True, np.True_, jnp.array(True), float(value), np.float32(value), jnp.float32(value),
        np.array([value]), str(value),
    ]  # fmt: skip


@functools.cache
def newborn():
    return sleepnet.init_state(SMALL, B)


@functools.cache
def task():
    return tasks.make(TASK)


def batch(**changes):
    sizes = {"batch_size": 3, "num_batches": 1, "num_threads": 0} | changes
    return next(tasks.batches(task(), "train", sizes.pop("batch_size"), **sizes)).tokens_WL


def program(form, *inputs, **sizes):
    return str(jax.make_jaxpr(functools.partial(form, **sizes))(*inputs))


def of_rule(form, count=5, dtype=jnp.float32, **sizes):
    """The program of a form of the local rule, for one head and 4 tokens."""
    shapes = [(1, 4, 1, 2)] * 3 + [(1, 4, 1)] * 2
    return program(form, *(jnp.zeros(shape, dtype) for shape in shapes[-count:]), **sizes)


def rolled(of=np.asarray, **plan) -> ClosedJaxpr:
    """The program of a rollout, with what it is given."""
    tokens, scored = of(TOKENS[:, None]), np.arange(L) < LENGTHS[:, None, None]
    form = functools.partial(sleepnet.rollout, config=SMALL, **plan)
    arrays = (tokens, of(LENGTHS[:, None]), tokens, scored)
    return jax.make_jaxpr(lambda params: form(params, *arrays))(PARAMS)


def sliced(n):
    begun = dataclasses.replace(sleepnet.begin_sleep(newborn(), config=SMALL),
                                pass_tokens=np.int32(L), core_tokens=np.int32(L),
                                all_tokens=np.int32(L))  # fmt: skip
    return sleepnet.continue_sleep(PARAMS, begun, tokens=n)


def snapshot(**changes):
    return Snapshot(
        state=None, policy=sleepnet.FixedPasses(1), sampling=sleepnet.Sampling(), **changes
    )


# name -> what is made of an integer, and one that fits.
NUMBERS = {
    "init_state": (lambda n: sleepnet.init_state(SMALL, n), 2),
    "sleep": (lambda n: sleepnet.sleep(PARAMS, newborn(), config=SMALL, passes=n), 2),
    "sleep_from_tokens": (
        lambda n: sleepnet.sleep_from_tokens(PARAMS, newborn(), TOKENS, config=SMALL, passes=n), 2
    ),
    "begin_sleep": (lambda n: sleepnet.begin_sleep(newborn(), config=SMALL, passes=n), 3),
    "continue_sleep": (sliced, 2),
    "window_passes": (lambda n: str(rolled(window_passes=[n])), 2),
    "scored_per_window": (lambda n: str(rolled(scored_per_window=[n])), 4),
    "parallel devices": (
        lambda n: sleepnet.parallel.sleep(PARAMS, newborn(), config=SMALL, passes=1, devices=n), 2
    ),
    "parallel.send": (
        lambda n: sleepnet.parallel.send(PARAMS, config=SMALL, rows=B, devices=n), 2
    ),
    "FixedPasses": (sleepnet.FixedPasses, 2),
    "UntilStill": (lambda n: sleepnet.UntilStill(at_most=n), 2),
    "WithinSeconds": (lambda n: sleepnet.WithinSeconds(seconds=1, at_most=n), 2),
    "top_k": (lambda n: sleepnet.Sampling(top_k=n), 2),
    "seed": (lambda n: sleepnet.Sampling(seed=n), 2),
    "stop": (lambda n: stop_ids([n], 3), 2),
    "limits": (lambda n: sleepnet.Limits(waiting=n, prompt=n, new_tokens=n), 2),
    "Mind.position": (lambda n: snapshot(position=n), 2),
    "Mind.sleeps": (lambda n: snapshot(sleeps=n), 2),
    "Session.fork": (lambda n: session().fork(seed=n).sampling, 2),
    "Session.policy": (lambda n: sleepnet.Session(PARAMS, config=SMALL, passes=n).policy, 2),
    "Session.rewind": (lambda n: session().rewind(n), 0),
    "Session.sleep": (lambda n: session().sleep(n), 2),
    "chunk": (lambda n: of_rule(gated_delta.chunked, chunk=n), 2),
    "group": (lambda n: of_rule(gated_delta.chunked, group=n), 2),
    "summarize": (lambda n: of_rule(gated_delta.summarize, count=4, chunk=n), 2),
    "kernel": (lambda n: of_rule(pallas_tpu.chunked, interpret=True, chunk=n), 16),
    "example": (lambda n: task().example("train", n), 2),
    "examples": (lambda n: task().examples("train", [n]), 2),
    "task passes": (lambda n: task().window_passes(n), 2),
    "token_name": (lambda n: task().token_name(n), 2),
    "batch_size": (lambda n: batch(batch_size=n), 2),
    "num_batches": (lambda n: batch(num_batches=n), 2),
    "first_batch": (lambda n: batch(first_batch=n), 2),
    "rows": (lambda n: batch(rows=[n]), 2),
}  # fmt: skip
# Those that run or compile for long with what they accept.
REFUSING = {
    "evaluate": lambda n: evaluate(PARAMS, EXPERIMENT, n),
    "evaluate_text": lambda n: evaluate_text(PARAMS, EXPERIMENT, n),
    "agreement": lambda n: agreement(PARAMS, EXPERIMENT, n),
    "generate": lambda n: expecting().generate(n),
    **{
        f"Engine {name}": lambda n, name=name: sleepnet.Engine(
            PARAMS, config=SMALL, **{"slots": 2, name: n}
        )
        for name in ("slots", "passes", "work", "group", "devices")
    },
}


@functools.cache
def session():
    return sleepnet.Session(PARAMS, config=SMALL)


def expecting():
    logits_Y = np.zeros(SMALL.vocab_size, np.float32)
    given = dataclasses.replace(session().snapshot, logits_Y=logits_Y)
    return sleepnet.Session.from_snapshot(PARAMS, given, config=SMALL)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_integer_of_any_type_is_that_integer(name):
    """The same result, hash and program as of Python's int."""
    call, value = NUMBERS[name]
    expected = call(value)
    programs = compiled()
    for kind in INTEGERS.values():
        result = call(kind(value))
        if isinstance(
            result, sleepnet.WakeState | slices.IncrementalSleep | sleepnet.Rollout | tasks.Example
        ):
            assert_identical(result, expected)
        elif isinstance(result, np.ndarray | dict):
            jax.tree.map(np.testing.assert_array_equal, result, expected)
        elif not isinstance(result, sleepnet.Spent):  # which has seconds
            assert result == expected and repr(result) == repr(expected)
    assert compiled() == programs


@pytest.mark.parametrize("name", [*NUMBERS, *REFUSING])
def test_what_is_not_an_integer_is_refused(name):
    """By a message that shows it."""
    call, value = NUMBERS.get(name) or (REFUSING[name], 2)
    for other in others(value):
        with pytest.raises(ValueError, match=r"(integer|devices must).*; got (?s:.)+"):
            call(other)


def compiled() -> int:
    """How many programs the functions of the window have."""
    return sum(
        function._cache_size()
        for function in (
            sleepnet.sleep.__globals__["_sleep"], sleepnet.sleep.__globals__["_sleep_from_tokens"],
            sleepnet.wake.__globals__["_wake"], slices._slice, decoding.step, decoding.read,
        )
    )  # fmt: skip


CONFIGS = [
    ModelConfig, DepoConfig, Rule110Config, FactsConfig,
    TextConfig, TrainingConfig, EvaluationConfig, MeshConfig,
]  # fmt: skip


def made(cls, **fields):
    return cls(**({"vocab_size": 13} if cls is ModelConfig else {}) | fields)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_integer_of_a_config_may_be_of_any_type(cls):
    """It is stored as Python's: the config is equal, hashes alike and can be written as JSON."""
    whole = made(cls)
    for field in dataclasses.fields(cls):
        value = getattr(whole, field.name)
        of_elements = typing.get_origin(field.type) is tuple and int in typing.get_args(field.type)
        if field.type not in (int, float) and not of_elements:
            continue
        value = 1 if value is None else value
        expected = made(cls, **{field.name: value})
        if isinstance(value, float) and value.is_integer():
            assert made(cls, **{field.name: np.int64(value)}) == expected
            assert made(cls, **{field.name: np.float32(value)}) == expected
        if field.type is float:
            continue
        for kind in INTEGERS.values():
            typed = list(map(kind, value)) if of_elements else kind(value)
            given = made(cls, **{field.name: typed})
            assert given == expected and hash(given) == hash(expected)
            assert json.dumps(dataclasses.asdict(given)) == json.dumps(dataclasses.asdict(expected))
        for other in (True, np.True_, 1.0, np.float32(1), jnp.float32(1), "1"):
            with pytest.raises(ConfigError, match=rf"{field.name} must be an integer; got"):
                made(cls, **{field.name: [other] if of_elements else other})


def decoded(of):
    zeros = of(np.zeros((B, L), np.int32))
    decoder = sleepnet.Decoder(PARAMS, newborn(), config=SMALL, tokens_BL=zeros)
    decoder.wake(of(TOKENS[:, 0]))
    decoder.read(of(TOKENS[:, :4]), length_B=of(LENGTHS))
    decoder.rewind(of(LENGTHS))
    return decoder.state, decoder.tokens_BL, decoder.length_B


# What is made of integers in arrays of some dtype.
ARRAYS = {
    "wake": lambda of: sleepnet.wake(
        PARAMS, newborn(), of(TOKENS), config=SMALL, length_B=of(LENGTHS)
    ),
    "sleep_from_tokens": lambda of: sleepnet.sleep_from_tokens(
        PARAMS, newborn(), of(TOKENS), config=SMALL, length_B=of(LENGTHS)
    ),
    "rollout": lambda of: rolled(of).consts,
    "Decoder": decoded,
    "Snapshot": lambda of: np.array(snapshot(tokens=of(LENGTHS)).tokens),
    "Snapshot.preceding": lambda of: np.array(snapshot(preceding=of(LENGTHS)).preceding),
}  # fmt: skip
DTYPES = {
    **{name: functools.partial(np.asarray, dtype=name)
       for name in ("int8", "uint8", "uint32", "int64", "uint64")},
    "list": lambda x: x.tolist(),
    "JAX": lambda x: jnp.asarray(x, jnp.uint8),
}  # fmt: skip
NOT_DTYPES = {
    "float": lambda x: x.astype(np.float32),
    "list of float": lambda x: (x + 0.5).tolist(),
    "bool": lambda x: x > 0,
    "JAX's float": lambda x: jnp.asarray(x, jnp.float32),
    "objects": lambda x: x.astype(object),
    "list with a bool": lambda x: (x > 0).tolist()[:-1] + (x * 0).tolist()[-1:],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_integers_of_any_dtype_are_the_same_integers(name):
    """Bit for bit and by the same programs."""
    expected = ARRAYS[name](lambda x: x)
    ARRAYS[name](jnp.asarray)  # for which jit keeps an entry of its own
    programs = compiled()
    for dtype, of in DTYPES.items():
        if (name, dtype) != ("rollout", "JAX"):  # which its program would convert
            assert_identical(ARRAYS[name](of), expected)
    assert compiled() == programs


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_another_kind_are_refused(name):
    for of in NOT_DTYPES.values():
        with pytest.raises(ValueError, match=r"must be integers; got \w+ of shape"):
            ARRAYS[name](of)
    with pytest.raises(ValueError, match=r"nested lists of different lengths"):
        ARRAYS[name](lambda _: [[1], [1, 2]])


def test_64_bits_change_nothing():
    """Where JAX is told to keep them, lengths and ids are 32 bits within, and results the same."""
    expected, rollout = ARRAYS["wake"](np.asarray), rolled().out_avals
    with jax.enable_x64(True):
        of = functools.partial(jnp.asarray, dtype=jnp.int64)
        found = ARRAYS["wake"](of)
        slept = jax.eval_shape(lambda: ARRAYS["sleep_from_tokens"](of))
        assert rolled(of).out_avals == rollout
    assert_agree(found, expected)
    for state in (found[1], slept):
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, newborn())


def test_a_session_of_64_bits_can_be_saved(tmp_path):
    """Its logits are of 32 bits, after several tokens as after one."""
    with jax.enable_x64(True):
        one = sleepnet.Session(PARAMS, config=SMALL)
        one.feed([1, 2, 3])
        assert one.logits.dtype == np.float32
        assert one.score([1, 2]).dtype == np.float32
        one.save(tmp_path / "one")
        again = sleepnet.Session.load(tmp_path / "one", PARAMS)
        assert_identical(again.logits, one.logits)


@pytest.mark.parametrize("values", [[2**70], [2**63, -1]])
def test_integers_of_more_than_64_bits_are_named(values):
    with pytest.raises(ValueError, match=f"at most 64 bits; got {values[0]}"):
        session().fork().feed(values)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, (1,), r"^n must be an integer of 1 or more; got 0; the nearest is 1$"),
        (np.int64(9), (1, 6), r"^n must be an integer in 1\.\.6; got 9; the nearest is 6$"),
        (2.6, (1, 6), r"^n must be an integer in 1\.\.6; got 2\.6; the nearest is 3$"),
        (1e9, (1, 6), r"got 1000000000\.0; the nearest is 6$"),
        (float("nan"), (1, 6), r"got nan$"),
        ("two", (), r"^n must be an integer; got 'two'$"),
        (None, (0,), r"got None$"),
    ],
)
def test_the_nearest_choice_is_named(value, bounds, message):
    with pytest.raises(ValueError, match=message):
        as_integer("n", value, *bounds)
