"""Sleep behind a full wake window, in ratio to one prefill of that window, float32.

The wake pass is the first of the N, so a sleep should cost N - 1 prefills; a prefill is `wake` of
all tokens of the window without logits. With N = 1 a sleep is the eviction alone, and its ratio
that to one prefill. A prelude runs in the prefill only; a coda once per sleep.

Slices are those of `begin_sleep`, `continue_sleep` and `finish_sleep`, each waited for before the
next, at N = 4: their total over the same sleep in one piece, and the longest. Medians of calls
that take turns; in brackets the 10th and 90th percentile over rounds. On CPU it is at home on one
core: NPROC=1 and GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make benchmark` sets.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

import sleepnet
from launch.benchmark.suites import Options
from sleepnet.config import ModelConfig
from sleepnet.evaluation.latency import Timing, interleaved

TAKES = ("repeats",)
PASSES = (1, 2, 4, 8)
SLICES = (16, 64, 256)
SLICED_PASSES = 4
_SMALL = ModelConfig(vocab_size=256, pattern="AGAG", d_model=256, window=256, num_heads=4)
# Each with its batch sizes.
MODELS = (
    (_SMALL, (1, 4)),
    (dataclasses.replace(_SMALL, pattern="G[AGAG]AG"), (1, 4)),
    (
        ModelConfig(vocab_size=256, pattern="AG" * 7, d_model=512, window=256, num_heads=8),
        (1,),
    ),
)

_wake = jax.jit(sleepnet.wake, static_argnames=("config", "logits"))
_sleep = jax.jit(sleepnet.sleep, static_argnames=("config", "passes"))


def run(options: Options) -> dict:
    return {
        "rows": [
            row
            for config, batches in MODELS
            for batch_size in batches
            for row in _rows(config, batch_size, options.repeats)
        ]
    }


def _rows(config: ModelConfig, batch_size: int, repeats: int):
    params = jax.block_until_ready(sleepnet.init_params(config, jax.random.key(0)))
    tokens_BL = np.random.default_rng(0).integers(
        config.vocab_size, size=(batch_size, config.window), dtype=np.int32
    )
    fresh = sleepnet.init_state(config, batch_size)
    prefill = functools.partial(_wake, params, fresh, tokens_BL, config=config, logits="none")
    _, state = prefill()
    sleeps = {N: functools.partial(_sleep, params, state, config=config, passes=N) for N in PASSES}
    sliced = {
        size: _Slices(params, state, config, size) for size in SLICES if size <= config.window
    }
    calls = {"prefill": prefill} | {f"{N} passes": sleep for N, sleep in sleeps.items()}
    clocked = {f"slices of {size}": progress.total_ms for size, progress in sliced.items()}
    timings = interleaved(calls, repeats, clocked=clocked)

    about = {"model": f"{config.pattern} d={config.d_model} L={config.window}", "B": batch_size}
    one = timings["prefill"]
    for N in PASSES:
        yield about | {
            "N": N,
            "ms": timings[f"{N} passes"].median_ms,
            "prefill ms": one.median_ms,
            "/ (N-1) prefills": [x / max(N - 1, 1) for x in timings[f"{N} passes"].ratio_to(one)],
        }
    for size, progress in sliced.items():
        whole = timings[f"slices of {size}"]
        yield about | {
            "N": SLICED_PASSES,
            "slice": size,
            "ms": whole.median_ms,
            "/ one piece": whole.ratio_to(timings[f"{SLICED_PASSES} passes"]),
            "longest slice ms": progress.longest(repeats).median_ms,
        }


class _Slices:
    """A sleep in slices that times itself."""

    def __init__(self, params, state, config, size):
        self._params, self._state, self._config, self._size = params, state, config, size
        self._longest_ms = []

    def total_ms(self) -> float:
        times_ms = []

        def timed(step, *args, **options):
            began = time.perf_counter()
            result = jax.block_until_ready(step(*args, **options))
            times_ms.append(1e3 * (time.perf_counter() - began))
            return result

        progress = timed(
            sleepnet.begin_sleep, self._state, config=self._config, passes=SLICED_PASSES
        )
        while not progress.done:
            progress = timed(sleepnet.continue_sleep, self._params, progress, tokens=self._size)
        timed(sleepnet.finish_sleep, progress, self._state)
        self._longest_ms.append(max(times_ms))
        return sum(times_ms)

    def longest(self, repeats) -> Timing:
        return Timing(tuple(self._longest_ms[-repeats:]))
