"""Speed on this machine: python -m launch.benchmark --suite=rule|train.

rule: `chunked` against `recurrent`, K = V = 64, H = 4, batch 1, forward and forward + backward.
train: tokens per second of a training step at N = 1 and N = 4 (d = 64 "AG", 16-token windows,
one of context and one of questions, batch 64). Variants take turns; medians are reported,
compilation apart. For one core: taskset -c 0 python -m launch.benchmark ...
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import cli
from sleepnet import storage, tasks
from sleepnet.config import DepoConfig, ModelConfig, TrainingConfig
from sleepnet.evaluation.latency import interleaved
from sleepnet.evaluation.machine import describe_machine
from sleepnet.ops import gated_delta
from sleepnet.training.step import init_train_state, make_train_step

_SUITE = flags.DEFINE_enum("suite", "rule", ["rule", "train"], "What to time.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each variant.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only by default.")

RULE_LENGTHS = (256, 1024, 4096)
TRAINED_PASSES = (1, 4)


def main(_):
    rows = {"rule": _rule, "train": _train}[_SUITE.value](_REPEATS.value)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}, jax {machine['jax']}")
    for row in rows:
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
    if _OUT.value:
        storage.write_json(
            pathlib.Path(_OUT.value), {"suite": _SUITE.value, "machine": machine, "rows": rows}
        )


def _rule(repeats):
    forms = {"recurrent": gated_delta.recurrent, "chunked": gated_delta.chunked}
    rows = []
    for T in RULE_LENGTHS:
        inputs = _rule_inputs(T, H=4, K=64)
        calls = {}
        for name, form in forms.items():
            forward, both = _forward(form), _forward_backward(form)
            calls[name, "forward"] = lambda f=forward, x=inputs: f(*x)
            calls[name, "forward + backward"] = lambda f=both, x=inputs: f(*x)
        timings = interleaved(calls, repeats)
        for work in ("forward", "forward + backward"):
            slow, fast = (timings[name, work].median_ms for name in forms)
            rows.append(
                {"T": T, "work": work, "recurrent_ms": slow, "chunked_ms": fast,
                 "chunked_speedup": slow / fast}
            )  # fmt: skip
    return rows


def _forward(form):
    return jax.jit(lambda *inputs: form(*inputs))


def _forward_backward(form):
    def loss(*inputs):
        out, state = form(*inputs)
        return jnp.sum(out**2) + jnp.sum(state**2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))


def _rule_inputs(T, H, K):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, H, K)).astype(np.float32) for _ in range(3))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = rng.uniform(size=(2, 1, T, H)).astype(np.float32)
    return q, k, v, -0.1 * g, beta


def _train(repeats):
    task = tasks.make(DepoConfig(nodes=8, symbols=8, hops=4, queries=8, window=16))
    batch = next(tasks.batches(task, "train", 64, num_batches=1))
    calls = {passes: _train_call(task, passes, batch) for passes in TRAINED_PASSES}
    timings = interleaved(calls, repeats)
    tokens = batch.tokens_WL.size
    return [
        {"N": passes, "step_ms": timing.median_ms, "tokens_per_s": 1e3 * tokens / timing.median_ms}
        for passes, timing in timings.items()
    ]


def _train_call(task, passes, batch):
    model = ModelConfig(
        vocab_size=task.vocab_size, pattern="AG", d_model=64, num_heads=2, window=task.window,
        passes=passes, learned_positions=True, unroll=True,
    )  # fmt: skip
    training = TrainingConfig(batch_size=64)
    step = make_train_step(model, training, task.window_passes(passes), task.scored_per_window)
    state = jax.jit(lambda: init_train_state(model, training))()

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return call


def _shown(value):
    return f"{value:,.1f}" if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    cli.run(main)
