"""How long a token, a sleep and a prefill take, by the wall clock."""

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sleepnet.config import ModelConfig
from sleepnet.cycle.cache import init_state
from sleepnet.cycle.sleep import sleep
from sleepnet.cycle.wake import wake
from sleepnet.types import WakeState

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over many, in the order of their rounds."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def p90_ms(self) -> float:
        return float(np.quantile(self.times_ms, 0.9))

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """How many times longer than `other`: of the medians, and p10 and p90 over rounds."""
        rounds = np.divide(self.times_ms, other.times_ms)
        low, high = np.quantile(rounds, (0.1, 0.9))
        return self.median_ms / other.median_ms, float(low), float(high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SleepTimings:
    """Of one full window: its sleep for each N, and for scale the `wake` that reads all of it."""

    sleep: dict[int, Timing]
    prefill: Timing


# Inside jit, `wake` leaves out its checks on the host: what is timed is the compiled step.
_wake = jax.jit(wake, static_argnames=("config", "logits"))


def wake_latency(
    params,
    model: ModelConfig,
    *,
    passes: tuple[int, ...] = (1, 2, 4),
    windows: tuple[int, ...] = (0, 64),
    batch_size: int = 1,
    repeats: int = 100,
) -> dict[tuple[int, int], Timing]:
    """Times `wake` of one token after so many windows, each slept on with N passes.

    It should be flat in both: a mind keeps its size, and N is paid at the boundary.

    Args:
      passes: every N.
      windows: how many full windows of random tokens lie behind the timed one.
      batch_size: rows that wake together.
      repeats: timed tokens of each variant.

    Returns:
      (N, windows) -> ms per call of T = 1.
    """
    starts = {
        (N, count): _live(params, model, batch_size, count, N) for N in passes for count in windows
    }
    walks = {key: _token_by_token(params, model, start) for key, start in starts.items()}
    return interleaved(walks, repeats)


def sleep_latency(
    params,
    model: ModelConfig,
    passes: tuple[int, ...] = (1, 2, 4, 8),
    *,
    batch_size: int = 1,
    repeats: int = 20,
) -> SleepTimings:
    """Times `sleep` on one full window for each N, and `wake` of that whole window.

    Args:
      passes: every N.
      batch_size: rows that sleep together.
      repeats: timed calls of each variant.
    """
    fresh = init_state(model, batch_size)
    tokens_BL = _random_tokens(model, batch_size)
    read = functools.partial(_wake, params, fresh, tokens_BL, config=model, logits="last")
    _, full = read()
    calls = {N: functools.partial(sleep, params, full, config=model, passes=N) for N in passes}
    timings = interleaved({**calls, "prefill": read}, repeats)
    return SleepTimings(prefill=timings["prefill"], sleep={N: timings[N] for N in passes})


def interleaved(
    calls: Mapping[Key, Callable[[], Any]],
    repeats: int,
    *,
    clocked: Mapping[Key, Callable[[], float]] | None = None,
) -> dict[Key, Timing]:
    """Times each call `repeats` times in rounds of all of them, after two rounds to warm up.

    In rounds, because machines are noisy: a slow spell then falls on all of them alike. Each round
    in an order of its own, always the same, because calls inherit what the one before left in the
    processor's caches.

    Args:
      calls: return arrays, which are waited for.
      clocked: further calls that time themselves and return milliseconds.
    """
    clocks = {key: functools.partial(_clock, call) for key, call in calls.items()}
    clocks = {**clocks, **(clocked or {})}
    times_ms = {key: [] for key in clocks}
    rng = random.Random(0)
    for _ in range(2 + repeats):
        for key in rng.sample(list(clocks), len(clocks)):
            times_ms[key].append(clocks[key]())
    return {key: Timing(tuple(times[2:])) for key, times in times_ms.items()}


def _clock(call) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - began)


def _live(params, model, batch_size, windows, passes) -> WakeState:
    state = init_state(model, batch_size)
    for number in range(windows):
        tokens_BL = _random_tokens(model, batch_size, seed=number)
        _, state = _wake(params, state, tokens_BL, config=model, logits="last")
        state = sleep(params, state, config=model, passes=passes)
    return state


def _token_by_token(params, model, start: WakeState) -> Callable:
    """A call that wakes one more token of a window each time; a full window starts over."""
    tokens_BL = _random_tokens(model, start.window.length_B.shape[0])
    state, t = start, 0

    def call():
        nonlocal state, t
        if t == model.window:
            state, t = start, 0
        logits_BY, state = _wake(
            params, state, tokens_BL[:, t : t + 1], config=model, logits="last"
        )
        t += 1
        return logits_BY, state

    return call


def _random_tokens(model, batch_size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(model.vocab_size, size=(batch_size, model.window), dtype=np.int32)
