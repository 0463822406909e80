"""A token with 1k to 1M tokens of context: a mind that sleeps, beside attention over all of them.

Float32, batch 1; both run what `sleepnet.Decoder` runs, which updates its state in place. "sleeps"
has read the whole context, window after window (with N = 1: it makes no difference to the cost of a
token). "attention" has as many blocks, all of them A, and keeps a cache that is filled with random
keys and values; where that does not fit, its row says so.

"/ shortest" is the token's time over that with the shortest context. "sleep ms" is the sleep behind
a full window, and "tokens/s" counts one after each window. "/ attention" is tokens/s over those of
attention; "bytes allow" is the same ratio if both ran at the read rate: for a token what it must
move, and for a sleep the larger of that and its FLOPs at the GEMM rate. "of read bound" holds a
token against its own bytes. "answer ms" is the time to the first token behind a question of 8;
"read s" that to read the context before: of "sleeps" its windows times the median
`sleep_from_tokens`, of "attention" its products at the GEMM rate, and so at least. "state MB" is
all that a mind holds, and of "attention" keys and values alone.

Medians of calls that take turns, in an order drawn anew each round. Of two tokens in each turn the
second is timed, so that what the others left in the processor's cache harms none. In brackets the
10th and 90th percentile over rounds. On CPU it is at home on one core: NPROC=1 and the
GLIBC_TUNABLES that `make benchmark` sets.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sleepnet
from launch.benchmark.suites import Options
from launch.benchmark.suites.machine import Machine, machine_calls
from launch.benchmark.suites.wake import token_bytes
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import cache
from sleepnet.evaluation.latency import Timing, interleaved
from sleepnet.inference import decoder
from sleepnet.nn import flops
from sleepnet.types import WakeState

TAKES = ("repeats",)
_LARGE = ModelConfig(vocab_size=8192, pattern="AG" * 4, d_model=512, window=256, num_heads=8)
_SMALL = ModelConfig(vocab_size=256, pattern="AG", d_model=64, window=256, num_heads=2)
# Each with its tokens of context; of "attention" they may be more.
MODELS = (
    (_LARGE, (1 << 10, 1 << 13, 1 << 17), (1 << 10, 1 << 13, 1 << 17, 1 << 20)),
    (_SMALL, (1 << 10, 1 << 13, 1 << 17, 1 << 20), (1 << 10, 1 << 13, 1 << 17, 1 << 20)),
)
ROOM = 6 << 30  # bytes that keys and values may take
_QUESTION, _SLOW_REPEATS, _WARM_UP = 8, 3, 2

_read = jax.jit(sleepnet.sleep_from_tokens, static_argnames=("config", "passes"))
_sleep = jax.jit(sleepnet.sleep, static_argnames="config")
_wake = jax.jit(sleepnet.wake, static_argnames=("config", "logits"))


def run(options: Options) -> dict:
    return {"rows": [row for model in MODELS for row in _rows(*model, options.repeats)]}


class Reader:
    """A mind of the speed of a `Decoder`, made of a state in layers of their own, so that a cache
    is never held twice."""

    def __init__(self, params, state, config: ModelConfig):
        self._params, self.state, self._config = params, state, config

    @property
    def token_bytes(self) -> int:
        return token_bytes(self._params, self.state)

    @property
    def state_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state))

    def token_ms(self) -> float:
        self._clock(1)
        return self._clock(1)

    def answer_ms(self) -> float:
        return self._clock(_QUESTION)

    def _clock(self, T) -> float:
        tokens_BT = np.zeros((1, T), np.int32)
        began = time.perf_counter()
        past, window = decoder.halves(self.state)
        logits_BY, window = decoder.step(self._params, past, window, tokens_BT, config=self._config)
        self.state = decoder.joined(past, window)
        jax.block_until_ready(logits_BY)
        return 1e3 * (time.perf_counter() - began)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """Of one kind of mind with one length of context; seconds."""

    reader: Reader
    token: Timing
    answer: Timing
    read_s: float
    sleep_s: float  # per token
    sleep_bound_s: float  # per token

    def tokens_per_second(self) -> float:
        return 1 / (self.token.median_ms / 1e3 + self.sleep_s)

    def bound_s(self, machine: Machine) -> float:
        return self.reader.token_bytes / machine.read

    def bound_per_second(self, machine: Machine) -> float:
        return 1 / (self.bound_s(machine) + self.sleep_bound_s)


def _rows(config: ModelConfig, ages, contexts, repeats) -> Iterator[dict]:
    timed = 2 * (repeats + _WARM_UP) + _QUESTION * (_SLOW_REPEATS + _WARM_UP)
    if timed > min(config.window, *ages, *contexts):
        raise ConfigError(f"--repeats: {repeats} rounds do not fit into a window; take fewer")
    attention = {context: with_attention_over(config, context) for context in contexts}
    fitting = [context for context in contexts if cache_bytes(attention[context]) <= ROOM]
    params = sleepnet.init_params(config, jax.random.key(0))
    readers = sleeping(config, params, ages, timed) | _attending(attention, fitting, timed)
    slow = interleaved(
        _calls_of_a_window(config, params),
        _SLOW_REPEATS,
        clocked={("answer", *key): reader.answer_ms for key, reader in readers.items()},
    )
    clocked = {key: reader.token_ms for key, reader in readers.items()}
    timings = interleaved(machine_calls(), repeats, clocked=clocked)
    machine = Machine.from_timings(timings)

    def measured(kind, context, **more):
        key = kind, context
        return _Measured(
            reader=readers[key], token=timings[key], answer=slow["answer", *key], **more
        )

    L = config.window
    minds = {
        context: measured(
            "sleeps", context,
            read_s=math.ceil(context / L) * slow["read"].median_ms / 1e3,
            sleep_s=slow["sleep"].median_ms / 1e3 / L,
            sleep_bound_s=_sleep_bound_s(config, params, machine) / L,
        )
        for context in ages
    }  # fmt: skip
    others = {
        context: measured(
            "attention", context,
            read_s=prefill_flops(attention[context]) / machine.gemm, sleep_s=0, sleep_bound_s=0,
        )
        for context in fitting
    }  # fmt: skip
    about = {"model": f"{config.num_blocks} blocks d={config.d_model} L={L} N={config.passes}"}
    for context in contexts:
        if context in ages:
            sleep = {"sleep ms": slow["sleep"].median_ms}
            row = _row_of_mind(context, minds, others, machine) | sleep
            yield about | {"mind": "sleeps", "context": str(context)} | row
        row = {"ms p50": "does not fit"}
        if context in fitting:
            row = _row(others[context], others[min(fitting)], machine)
        size = {"state MB": cache_bytes(attention[context]) / 1e6}
        yield about | {"mind": "attention", "context": str(context)} | row | size


def _row_of_mind(context: int, minds: dict, others: dict, machine: Machine) -> dict[str, Any]:
    mind, other = minds[context], others.get(context)
    row = _row(mind, minds[min(minds)], machine)
    row["state MB"] = mind.reader.state_bytes / 1e6
    if other is not None:
        row["/ attention"] = mind.tokens_per_second() / other.tokens_per_second()
        row["bytes allow"] = mind.bound_per_second(machine) / other.bound_per_second(machine)
    return row


def _row(measured: _Measured, shortest: _Measured, machine: Machine) -> dict[str, Any]:
    token = measured.token
    return {
        "ms p50": token.median_ms,
        "ms p99": float(np.quantile(token.times_ms, 0.99)),
        "/ shortest": token.ratio_to(shortest.token),
        "sleep ms": None,
        "tokens/s": measured.tokens_per_second(),
        "/ attention": None,
        "bytes allow": None,
        "of read bound": measured.bound_s(machine) / (token.median_ms / 1e3),
        "answer ms": measured.answer.median_ms,
        "read s": measured.read_s,
        "state MB": None,
        "MB moved": measured.reader.token_bytes / 1e6,
        **machine.row(),
    }


def sleeping(config: ModelConfig, params, ages, room: int) -> dict:
    """Minds of each age that leave `room` at the end of their window."""
    layers, readers = decoder.unstack_params(params), {}
    state = sleepnet.init_state(config, 1)
    for number in range(1, max(ages) // config.window + 1):
        tokens_BL = random_tokens(config, config.window, seed=number)
        state = _read(params, state, tokens_BL, config=config, passes=1)
        if number * config.window in ages:
            live = state
            if room < config.window:
                rest_BT = random_tokens(config, config.window - room)
                _, live = _wake(params, state, rest_BT, config=config, logits="none")
            reader = Reader(layers, decoder.unstack_state(live), config)
            readers["sleeps", number * config.window] = reader
    return readers


def _attending(attention: dict[int, ModelConfig], fitting, room: int) -> dict:
    """Attention over all tokens of each context, of which the last `room` are to come."""
    if not fitting:
        return {}
    params = sleepnet.init_params(attention[fitting[0]], jax.random.key(0))
    layers = decoder.unstack_params(params)
    return {
        ("attention", context): Reader(
            layers, with_filled_cache(attention[context], context - room), attention[context]
        )
        for context in fitting
    }


def with_attention_over(config: ModelConfig, context: int) -> ModelConfig:
    """As many blocks, all of them attention over all of `context` tokens."""
    return dataclasses.replace(config, pattern="A" * config.num_blocks, window=context)


def cache_bytes(config: ModelConfig) -> int:
    """Keys and values of a full window, in all A blocks, of one mind."""
    blocks = sum(repeats * period.count("A") for period, repeats in map(config.blocks, cache.PARTS))
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    return blocks * 2 * config.window * config.num_kv_heads * config.head_dim * itemsize


def with_filled_cache(config: ModelConfig, tokens: int) -> WakeState:
    """A mind with `tokens` random keys and values, every layer in arrays of its own."""
    shapes = jax.eval_shape(lambda: decoder.apart(sleepnet.init_state(config, 1)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    blocks = jax.tree.map(_normal_like, state.window.blocks)
    length_B = jnp.full((1,), tokens, jnp.int32)
    return state.replace(window=state.window.replace(blocks=blocks, length_B=length_B))


@functools.partial(jax.jit, donate_argnums=0)
def _normal_like(x):
    return jax.random.normal(jax.random.key(0), x.shape, x.dtype)


def _calls_of_a_window(config: ModelConfig, params) -> dict:
    """A full window's sleep, and reading and sleeping at once, with N passes."""
    tokens_BL = random_tokens(config, config.window)
    fresh = sleepnet.init_state(config, 1)
    _, full = _wake(params, fresh, tokens_BL, config=config, logits="none")
    return {
        "sleep": functools.partial(_sleep, params, full, config=config),
        "read": functools.partial(
            _read, params, fresh, tokens_BL, config=config, passes=config.passes
        ),
    }


def _sleep_bound_s(config: ModelConfig, params, machine: Machine) -> float:
    """At least what N - 1 passes of a core without prelude and coda take."""
    core = sum(x.nbytes for x in jax.tree.leaves(params["core"]))
    compute_s = flops.part_flops(config, "core", config.window) / machine.gemm
    return (config.passes - 1) * max(core / machine.read, compute_s)


def prefill_flops(config: ModelConfig) -> int:
    """Of reading a full window of attention once, each token looking at those before it."""
    L, inner = config.window, config.num_heads * config.head_dim
    never_looked_at = config.num_blocks * 2 * L * (L - 1) * inner
    return flops.window_flops(config, L, 1, 1) - never_looked_at


def random_tokens(config: ModelConfig, T: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.integers(config.vocab_size, size=(1, T), dtype=np.int32)
