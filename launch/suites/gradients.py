"""Training steps of experiments/depo_small.py, N = 4, by what gradients run through.

All passes; all, computed again in the backward pass (`model.remat=pass`); and the last k of a
window's passes (`model.gradient_passes`). Calls take turns; ratios of time are to all passes,
in brackets the 10th and 90th percentile over rounds. Temp MB is what the compiled step needs
besides its state and batch; GFLOP are the products of matrices of a step by `flops`, without
what is computed again. On CPU it is at home on one core: NPROC=1 and
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make results-gradients` sets.
"""

import dataclasses
from typing import Any

import jax

from experiments import depo_small
from launch import cli
from launch.suites import Options
from sleepnet import flops, tasks
from sleepnet.evaluation.latency import interleaved
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
    task, batch_size = tasks.make(config.task), config.training.batch_size
    batch = next(tasks.batches(task, "train", batch_size, num_batches=1))
    steps = {
        name: _Step(task, dataclasses.replace(config.model, **changes), config.training, batch)
        for name, changes in VARIANTS.items()
    }
    timings = interleaved(steps, options.repeats)
    return {
        "rows": [
            {
                "gradients": name,
                "step ms": timings[name].median_ms,
                f"/ {ALL}": timings[name].ratio_to(timings[ALL]),
                "tokens/s": 1e3 * batch.tokens_WL.size / timings[name].median_ms,
                "temp MB": step.temp_bytes / 1e6,
                "GFLOP": batch_size * step.row_flops / 1e9,
            }
            for name, step in steps.items()
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
        self.row_flops = flops.training_flops(model, *plan)

    def __call__(self):
        self._state, metrics = self._step(self._state, self._batch)
        return metrics
