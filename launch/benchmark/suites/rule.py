"""The local rule on one device, float32, beside other implementations of it.

Times are medians of calls that take turns; a ratio is how many times longer the peer takes, with
the 10th and 90th percentile over rounds in brackets. Keys and queries are normalised beforehand,
and compiling is not timed. "Same chunk" is 64, which the peers use; "own" is what
`gated_delta.chunked` chooses by itself. The share of the GEMM rate is that of
F = 6 K V + C (4 K + 4 V) + 2/3 C² FLOPs per token and head at C = 64, three times as much with the
backward pass, against a float32 product of 2048³ in the same run. "scan" is one token after
another; its backward pass keeps the state of each, and is left out where these exceed 4 GB.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmark import peers
from launch.benchmark.suites import Options, threads
from launch.benchmark.suites.machine import Machine, machine_calls
from sleepnet.evaluation.latency import interleaved
from sleepnet.ops import gated_delta

TAKES = ("repeats", "shapes", "peers")
SHAPES = (
    (1, 1024, 4, 64), (1, 4096, 4, 64), (1, 16384, 4, 64), (1, 4096, 16, 64),
    (1, 1024, 4, 128), (1, 4096, 8, 128), (1, 1024, 16, 128), (1, 16384, 8, 128),
)  # fmt: skip
WORKS = ("forward", "forward + backward")
PEER_CHUNK = 64
SCAN_BYTES = 4e9
FORMS = {
    "same chunk": functools.partial(gated_delta.chunked, chunk=PEER_CHUNK),
    "own": gated_delta.chunked,
    "scan": gated_delta.recurrent,  # a peer within
}


def run(options: Options) -> dict:
    outside = [name for name in options.peers if name != "scan"]
    inside = [name for name in FORMS if name != "scan" or name in options.peers]
    with contextlib.ExitStack() as running:
        started = [
            running.enter_context(peers.start(name, options.environments, threads()))
            for name in outside
        ]
        rows = [
            row
            for shape in options.shapes or SHAPES
            for row in _rows(shape, inside, started, options.repeats)
        ]
    return {"rows": rows, "peers": {peer.name: peer.versions for peer in started}}


def _rows(shape, inside, started, repeats):
    inputs = rule_inputs(*shape)
    for peer in started:
        peer.load(inputs)
    for work in WORKS:
        here = [name for name in inside if name != "scan" or _scan_fits(shape, work)]
        calls = {name: _call(FORMS[name], work, inputs) for name in here}
        reference = _named(calls["own"](), work)
        for peer in started:
            peer.check(work, reference)
        clocked = {peer.name: functools.partial(peer.run, work) for peer in started}
        timings = interleaved(calls | machine_calls(), repeats, clocked=clocked)
        yield _row(shape, work, timings, [*here, *clocked])


def _scan_fits(shape, work):
    B, T, H, D = shape
    return work == "forward" or 4 * B * T * H * D * D <= SCAN_BYTES


def _row(shape, work, timings, names):
    machine = Machine.from_timings(timings)
    least_s = rule_flops(*shape) * (1 if work == "forward" else 3) / machine.gemm
    row = {"B x T x H x D": " x ".join(map(str, shape)), "work": work}
    for name in ("same chunk", "own"):
        row[f"{name} ms"] = timings[name].median_ms
        row[f"{name} of GEMM"] = least_s / (timings[name].median_ms / 1e3)
    for name in names:
        if name in row or name in ("same chunk", "own"):
            continue
        row[f"{name} ms"] = timings[name].median_ms
        for ours in ("same chunk", "own"):
            row[f"{name} / {ours}"] = timings[name].ratio_to(timings[ours])
    return row | machine.row()


def rule_flops(B, T, H, D, C=PEER_CHUNK):
    """Of the forward pass, without the products that only one form needs."""
    return B * T * H * (6 * D * D + 8 * C * D + 2 * C * C / 3)


def rule_inputs(B, T, H, D) -> dict[str, np.ndarray]:
    """q, k, v (B, T, H, D), log decay g and write strength beta (B, T, H), float32, seeded."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, H, D)).astype(np.float32) for _ in range(3))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = rng.uniform(size=(2, B, T, H)).astype(np.float32)
    return {"q": q, "k": k, "v": v, "g": np.float32(-0.1) * g, "beta": beta}


def _call(form, work, inputs):
    arrays = tuple(jnp.asarray(x) for x in inputs.values())
    run = form if work == "forward" else jax.grad(functools.partial(_loss, form), range(5))
    return functools.partial(jax.jit(lambda *xs: run(*xs)), *arrays)


def _loss(form, *inputs):
    out, state = form(*inputs)
    return jnp.sum(out**2) + jnp.sum(state**2)


def _named(results, work):
    names = ("out", "state") if work == "forward" else ("dq", "dk", "dv", "dg", "dbeta")
    return dict(zip(names, map(np.asarray, results), strict=True))
