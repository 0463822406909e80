"""One token per row and call, 50 million parameters, float32, in windows that are nearly full.

"decoder" is `sleepnet.Decoder`, which updates its state in place, its layers written out; "wake" is
`sleepnet.wake`, which leaves the caller's alive, with a loop over its layers; "wake, unrolled" the
same with them written out. The bound is the larger of bytes / bandwidth and FLOPs / GEMM rate, all
measured in the same run: every parameter read once, each row's fast weights read and written, its
keys and values read; twice the matrices' parameters per row. "Of copy bound" takes the rate at
which 256 MiB are changed in place, read and written bytes together; but a token mostly reads, and
"of read bound" takes the rate at which a matrix of 256 MiB is multiplied by a vector. Ages are
whole windows, each read and slept on with N = 1; the last column compares with age 1. Medians of
calls that take turns; in brackets the 10th and 90th percentile over rounds. On CPU it is at home on
one core: NPROC=1 and GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make benchmark` sets.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

import sleepnet
from launch.benchmark.suites import Options
from launch.benchmark.suites.machine import Machine, machine_calls
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.evaluation.latency import interleaved
from sleepnet.nn import flops

TAKES = ("repeats",)
CONFIG = ModelConfig(vocab_size=8192, pattern="AG" * 7, d_model=512, window=256, num_heads=8)
# Batch sizes, each with how many windows its minds have lived.
AGES = {1: (1, 1000), 64: (1,)}

_wake = jax.jit(sleepnet.wake, static_argnames=("config", "logits"))


def run(options: Options) -> dict:
    most = CONFIG.window - 3  # two tokens to warm up, and one that lies there already
    if options.repeats > most:
        raise ConfigError(f"--repeats: at most {most} fit into a window; got {options.repeats}")
    params = jax.block_until_ready(sleepnet.init_params(CONFIG, jax.random.key(0)))
    rows = [
        row
        for batch_size, ages in AGES.items()
        for row in _rows(CONFIG, params, batch_size, ages, options.repeats)
    ]
    return {"rows": rows}


def _rows(config: ModelConfig, params, batch_size, ages, repeats):
    states = list(_live(config, params, batch_size, ages, config.window - repeats - 2))
    decoders = [sleepnet.Decoder(params, state, config=config) for state in states]
    tokens_B = np.zeros(batch_size, np.int32)
    plain = {
        name: functools.partial(
            sleepnet.wake, params, states[0], tokens_B[:, None],
            config=dataclasses.replace(config, unroll=unroll), logits="last",
        )
        for name, unroll in (("wake", False), ("wake, unrolled", True))
    }  # fmt: skip
    clocked = {
        age: functools.partial(_clock, decoder, tokens_B)
        for age, decoder in zip(ages, decoders, strict=True)
    }
    timings = interleaved(plain | machine_calls(), repeats, clocked=clocked)
    machine = Machine.from_timings(timings)
    compute_s = _token_flops(config, batch_size) / machine.gemm
    moved = token_bytes(params, states[0])
    for age in ages:
        token_s = timings[age].median_ms / 1e3
        yield {
            "B": batch_size,
            "windows lived": age,
            "decoder ms": timings[age].median_ms,
            "of copy bound": max(compute_s, moved / machine.copy) / token_s,
            "of read bound": max(compute_s, moved / machine.read) / token_s,
            **{f"{name} / decoder": timings[name].ratio_to(timings[age]) for name in plain},
            "/ age 1": timings[age].ratio_to(timings[ages[0]]),
            "MB": moved / 1e6,
            **machine.row(),
        }


def token_bytes(params, state) -> int:
    """What one call must move: parameters and caches read, fast weights written too."""
    embedding = params["embedding"]
    untied = "head" in params
    looked_up = embedding.nbytes if untied else 0
    fast_weights = sum(x.nbytes for x in jax.tree.leaves(state.fast_weights))
    return (
        sum(x.nbytes for x in jax.tree.leaves(params)) - looked_up
        + 2 * fast_weights
        + sum(x.nbytes for x in jax.tree.leaves(_attention(state)))
    )  # fmt: skip


def _attention(state):
    blocks = [block for part in state.window.blocks.values() for block in part]
    return [block for block in blocks if hasattr(block, "keys")]


def _token_flops(config, batch_size):
    return batch_size * flops.window_flops(config, 1, 1, 1)


def _live(config, params, batch_size, ages, last_tokens):
    """States after each age, `last_tokens` into the window that follows."""
    rng = np.random.default_rng(0)

    def read(state, T):
        tokens_BT = rng.integers(config.vocab_size, size=(batch_size, T), dtype=np.int32)
        return _wake(params, state, tokens_BT, config=config, logits="none")[1]

    state = sleepnet.init_state(config, batch_size)
    for lived in range(1, max(ages) + 1):
        state = sleepnet.sleep(params, read(state, config.window), config=config, passes=1)
        if lived in ages:
            yield read(state, last_tokens)


def _clock(decoder, tokens_B) -> float:
    began = time.perf_counter()
    jax.block_until_ready(decoder.wake(tokens_B))
    return 1e3 * (time.perf_counter() - began)
