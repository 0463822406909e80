"""What the TPU compiler makes of the rule, of a wake step and of a sleep over all devices: compiled
for these topologies on a machine without a TPU, never run on one.

The rule: q, k and v in bfloat16, 1 x 8192 tokens, 16 heads of 128, chunks of 64; XLA's form, and
the kernel of backend="pallas". Wake: a token of a `Decoder` for each of 64 rows. Sleep: 3 passes of
one window, under pmap along the window. Both have 54 million parameters, windows of 256 tokens a
device, bfloat16. Memory is per device; temporary is what lies beside arguments and results. FLOPs
and bytes are XLA's `cost_analysis`, with the kernel's own account of itself. XLA takes the body of
a loop once, so that the loops of the rule's XLA form and of a sleep are counted too low; and it
takes an array that is updated in place as read and written whole, so that wake is counted too high.
The least time is that of these counts at the rates of Google's data sheets. Collectives of a sleep,
with the bytes of their results, are read from the compiled program.
"""

import collections
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from launch.benchmark.suites import Options
from launch.common.chips import CHIPS
from launch.compile.steps import shapes
from launch.compile.topologies import topology
from sleepnet.config import ModelConfig
from sleepnet.cycle import parallel
from sleepnet.cycle.sleep import sleep_inputs
from sleepnet.evaluation.programs import Program
from sleepnet.inference import decoder
from sleepnet.ops import gated_delta
from sleepnet.ops.gated_delta import chunks, pallas_tpu

TAKES = ()
RULE_TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:4x4")
MODEL_TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v6e:4x4")
RULE_SHAPE = (1, 8192, 16, 128)
CHUNK = 64
ROWS, PASSES, TOKENS_PER_DEVICE = 64, 3, 256
MODEL = ModelConfig(
    vocab_size=8192, pattern="AG" * 7, d_model=512, window=256, num_heads=8, chunk=CHUNK,
    compute_dtype="bfloat16",
)  # fmt: skip


def run(options: Options) -> dict:
    del options  # nothing is repeated
    rows = [{"topology": name, **row} for name in RULE_TOPOLOGIES for row in _rule_rows(name)]
    for name in MODEL_TOPOLOGIES:
        rows += [{"topology": name, **_wake_row(name)}, {"topology": name, **_sleep_row(name)}]
    return {"rows": rows}


def _rule_rows(name):
    B, T, H, K = RULE_SHAPE
    x, gate, state = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            (RULE_SHAPE, jnp.bfloat16), ((B, T, H), jnp.float32), ((B, H, K, K), jnp.float32),
        )
    )  # fmt: skip
    # As many chunks at once as on a TPU; what this machine's own platform takes does not matter.
    group = chunks.OTHER_GROUP_HEADS // (B * H)
    forms = {
        "xla": functools.partial(gated_delta.chunked, chunk=CHUNK, group=group),
        "pallas": functools.partial(pallas_tpu.chunked, chunk=CHUNK),
    }
    for form, rule in forms.items():
        compiled, seconds = _compile(jax.jit(rule).lower, name, x, x, x, gate, gate, state)
        yield {"program": "rule", "form": form, **_about(compiled, seconds, name)}


def _wake_row(name):
    params, state = shapes(MODEL, ROWS)
    params = jax.eval_shape(decoder.unstack_params, params)
    past, window = decoder.halves(jax.eval_shape(decoder.unstack_state, state))
    tokens = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
    compiled, seconds = _compile(
        functools.partial(decoder.step.lower, config=MODEL), name, params, past, window, tokens
    )
    return {"program": "wake", "form": "xla", **_about(compiled, seconds, name)}


def _sleep_row(name):
    devices = topology(name).devices
    config = dataclasses.replace(MODEL, window=TOKENS_PER_DEVICE * len(devices))
    params, state = shapes(config, 1)
    inputs = jax.eval_shape(sleep_inputs, state)
    features = state.window.features_BLD
    parts = jax.ShapeDtypeStruct(
        (len(devices), 1, TOKENS_PER_DEVICE, config.d_model), features.dtype
    )
    began = time.perf_counter()
    spread = parallel.refine_over_window(config, PASSES, devices)
    compiled = spread.lower(params, inputs, parts).compile()
    seconds = time.perf_counter() - began
    found = collections.Counter()
    for kind, size in Program(compiled).collectives:
        found[kind, size] += 1
    return {
        "program": f"sleep over {len(devices)}",
        "form": "xla",
        **_about(compiled, seconds, name),
        "collectives": "; ".join(
            f"{count} {kind} of {size / 1e6:.3g} MB"
            for (kind, size), count in sorted(found.items())
        ),
    }


def _compile(lower, name, *shapes):
    place = SingleDeviceSharding(topology(name).devices[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    began = time.perf_counter()
    return lower(*shapes).compile(), time.perf_counter() - began


def _about(compiled, seconds, name):
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    chip = CHIPS[name.split(":")[0]]
    flops, moved = cost["flops"], cost["bytes accessed"]
    return {
        "compiled in s": seconds,
        "arguments MB": memory.argument_size_in_bytes / 1e6,
        "temporary MB": memory.temp_size_in_bytes / 1e6,
        "GFLOP": flops / 1e9,
        "HBM MB": moved / 1e6,
        "least ms": 1e3 * max(flops / chip.flops, moved / chip.hbm_rate),
    }
