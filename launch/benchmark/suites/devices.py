"""The rule, and one pass of a sleep, spread along the window over all local devices, against one.

Work is read from the compiled programs, loop bodies as often as they run: "device / share" is the
FLOPs of the products per device over 1/P of those on one device, whose rule takes its best form. A
device folds its tokens into an affine map, exchanges it, and runs its tokens again from the state
that the maps before it make. "Steps in a row" are the small products that wait for one another:
chunks on one device; 2/P of them, and the maps of the devices before. "Exchanged" is the bytes that
a device has after all collectives. Largest differences are relative to the largest entry, of the
last state; "same bits" compares two runs. Times of virtual devices, which share the cores of one
machine, say nothing of speed. On CPU there are several devices with
XLA_FLAGS=--xla_force_host_platform_device_count=8, as `make benchmark` sets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import sleepnet
from launch.benchmark.suites import Options
from launch.benchmark.suites.rule import rule_inputs
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import parallel
from sleepnet.cycle.sleep import sleep_inputs
from sleepnet.evaluation.latency import interleaved
from sleepnet.evaluation.programs import Program
from sleepnet.ops import gated_delta
from sleepnet.ops.gated_delta import device_scan

TAKES = ("repeats", "shapes")
SHAPES = ((1, 8192, 2, 64), (1, 8192, 2, 128), (1, 32768, 2, 128))
CHUNK = 64
MODEL = ModelConfig(
    vocab_size=256, pattern="AG", d_model=256, window=2048, num_heads=4, passes=2, chunk=CHUNK
)


def run(options: Options) -> dict:
    P = jax.local_device_count()
    if P == 1:
        raise ConfigError(
            "--suite=devices: this machine has one device; on CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    shapes = options.shapes or SHAPES
    for shape in shapes:
        _check_share("T of a shape", shape[1], P)
    _check_share("the window of the sleep", MODEL.window, P)
    rows = [_rule_row(shape, P, options.repeats) for shape in shapes]
    return {"rows": [*rows, _sleep_row(P, options.repeats)]}


def _check_share(name, tokens, P):
    if tokens % (P * CHUNK):
        raise ConfigError(
            f"--suite=devices: {name} must be a multiple of {P * CHUNK}, {P} devices times "
            f"chunks of {CHUNK}; got {tokens}"
        )


def _rule_row(shape, P, repeats):
    B, T, H, D = shape
    *tokens, state = *rule_inputs(*shape).values(), np.zeros((B, H, D, D), np.float32)
    split = [np.stack(np.split(x, P, axis=1)) for x in tokens]
    one = jax.jit(functools.partial(gated_delta.chunked, chunk=CHUNK, group=1))
    spread = jax.pmap(
        functools.partial(device_scan.over_devices, axis_name="window", chunk=CHUNK),
        axis_name="window", in_axes=(0,) * len(tokens) + (None,), out_axes=(0, None),
    )  # fmt: skip
    row = _compare(
        functools.partial(one, *tokens, state), functools.partial(spread, *split, state),
        one.lower(*tokens, state), spread.lower(*split, state), P, repeats,
    )  # fmt: skip
    steps = T // CHUNK
    about = {"work": "rule", "shape": " x ".join(map(str, shape)), "P": P}
    return about | {"steps in a row, one": steps, "over P": 2 * steps // P + P - 1} | row


def _sleep_row(P, repeats):
    params = sleepnet.init_params(MODEL, jax.random.key(0))
    tokens_BL = np.random.default_rng(0).integers(
        MODEL.vocab_size, size=(1, MODEL.window), dtype=np.int32
    )
    fresh = sleepnet.init_state(MODEL, 1)
    _, state = sleepnet.wake(params, fresh, tokens_BL, config=MODEL, logits="none")
    one = jax.jit(functools.partial(sleepnet.sleep, config=MODEL))
    spread = parallel.refine_over_window(MODEL, MODEL.passes, tuple(jax.local_devices()))
    features_PBTD = jnp.stack(jnp.split(state.window.features_BLD, P, axis=1))
    row = _compare(
        lambda: one(params, state).fast_weights,
        functools.partial(spread, params, sleep_inputs(state), features_PBTD),
        one.lower(params, state), spread.lower(params, sleep_inputs(state), features_PBTD), P,
        repeats,
    )  # fmt: skip
    shape = f"{MODEL.pattern} d={MODEL.d_model} L={MODEL.window}"
    return {"work": "one pass of a sleep", "shape": shape, "P": P} | row


def _compare(one, spread, one_lowered, spread_lowered, P, repeats):
    alone, each = (Program(lowered.compile()) for lowered in (one_lowered, spread_lowered))
    timings = interleaved({"one": one, "P": spread}, repeats)
    first, again = jax.device_get((spread(), spread()))
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
    last, expected = (jax.tree.leaves(jax.device_get(call()))[-1] for call in (spread, one))
    return {
        "device / share": each.dot_flops * P / alone.dot_flops,
        "collectives": ", ".join(
            f"{kind} {size / 1e6:.3g} MB" for kind, size in sorted(each.collectives)
        ),
        "exchanged MB": sum(size for _, size in each.collectives) / 1e6,
        "largest difference": float(np.abs(last - expected).max() / np.abs(expected).max()),
        "same bits": str(all(np.array_equal(x, y) for x, y in pairs)),
        "one ms": timings["one"].median_ms,
        "P / one": timings["P"].ratio_to(timings["one"]),
    }
