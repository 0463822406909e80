"""Training steps of experiments/depo_small.py, N = 4, by what gradients run through.

All passes; all, computed again in the backward pass (`model.remat=pass`); and the last k of a
window's passes (`model.gradient_passes`). Calls take turns; ratios of time are to all passes,
in brackets the 10th and 90th percentile over rounds. Temp MB is what the compiled step needs
besides its state and batch, with loops written out as depo_small has them and with loops kept
(`model.unroll=False`); GFLOP are the products of matrices of a step by `flops`, without what is
computed again. On CPU it is at home on one core: NPROC=1 and
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make results-gradients` sets.
"""

import dataclasses
from typing import Any

import jax

from experiments import depo_small
from launch.benchmark.suites import Options
from launch.common import cli
from sleepnet import tasks
from sleepnet.evaluation.latency import interleaved
from sleepnet.nn import flops
from sleepnet.training.step import init_train_state, make_train_step

TAKES = ("repeats",)
ALL = "all"
VARIANTS: dict[str, dict[str, Any]] = {
    ALL: {},
    "all, remat=pass": dict(remat="pass"),
    **{f"last {k}": dict(gradient_passes=k) for k in (3, 2, 1)},
}


def run(options: Options) -> dict:
    config = cli.experiment_config(depo_small.get_config())
    task = tasks.make(config.task)
    batch = next(tasks.batches(task, "train", config.training.batch_size, num_batches=1))

    def step(**changes):
        model = dataclasses.replace(config.model, **changes)
        return _Step(task, model, config.training, batch)

    steps = {name: step(**changes) for name, changes in VARIANTS.items()}
    looped = {name: step(**changes, unroll=False) for name, changes in VARIANTS.items()}
    timings = interleaved(steps, options.repeats)
    return {
        "rows": [
            {
                "gradients": name,
                "step ms": timings[name].median_ms,
                f"/ {ALL}": timings[name].ratio_to(timings[ALL]),
                "tokens/s": 1e3 * batch.tokens_WL.size / timings[name].median_ms,
                "temp MB": steps[name].temp_bytes / 1e6,
                "temp MB with loops": looped[name].temp_bytes / 1e6,
                "GFLOP": steps[name].flops / 1e9,
            }
            for name in VARIANTS
        ]
    }


class _Step:
    """A call is one step of training, in the state that the last one left."""

    def __init__(self, task, model, training, batch):
        plan = task.window_passes(model.passes), task.scored_per_window
        self._batch = batch
        self._state = jax.jit(lambda: init_train_state(model, training))()
        step = make_train_step(model, training, *plan)
        self._step = step.lower(self._state, batch).compile()
        memory: Any = self._step.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes
        self.flops = training.batch_size * flops.training_flops(model, *plan)

    def __call__(self):
        self._state, metrics = self._step(self._state, self._batch)
        return metrics
