"""What the training loop costs on depo_small: data, metrics, logs, heartbeats and checkpoints as
the experiment has them, against the bare compiled step on one batch that lies on the device.

They take turns of 20 steps: the loop is held while the bare step runs, and both are waited for at
the ends of their turns. Each round is one interval between checkpoints, 200 steps of each. "Loop /
bare" is the throughput of the loop over that of the bare step, of all rounds together; p10 and p90
are over rounds. "By CPU time" is the same by the processor seconds of all threads: on a busy
machine it is the truer one, and a lower bound, since data and checkpoints are made by threads that
may have a core of their own. On CPU it is at home on one core: NPROC=1 and
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make benchmark` sets.
"""

import dataclasses
import pathlib
import tempfile
import time

import jax
import numpy as np

from experiments import depo_small
from launch import cli
from launch.suites import Options
from sleepnet import tasks
from sleepnet.config import MeshConfig
from sleepnet.training import loop
from sleepnet.training.step import init_train_state, make_train_step

TAKES = ("repeats",)
TURN = 20
PASSES = (1, 4)


def run(options: Options) -> dict:
    return {"rows": [_row(N, options.repeats) for N in PASSES]}


def _row(passes, rounds) -> dict:
    config = cli.experiment_config(depo_small.get_config())
    model = dataclasses.replace(config.model, passes=passes)
    config = dataclasses.replace(config, model=model, mesh=MeshConfig(data=1))
    every = config.training.checkpoint_every
    # Turns begin in the middle between two checkpoints: each round has all the work of one.
    first, last = every // 2 + 1, every // 2 + 1 + rounds * every
    training = dataclasses.replace(config.training, steps=last + TURN)
    turns = _Turns(_bare_step(config), first, last)
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(
            dataclasses.replace(config, training=training), pathlib.Path(workdir),
            on_phase=turns, should_stop=lambda: turns.ended,
        )  # fmt: skip
    looped, bare, looped_cpu, bare_cpu = (
        np.reshape(times, (rounds, every // TURN)).sum(1)
        for times in (*zip(*turns.looped, strict=True), *zip(*turns.bare, strict=True))
    )
    low, high = np.quantile(bare / looped, (0.1, 0.9))
    task = tasks.make(config.task)
    tokens = rounds * every * config.training.batch_size * task.num_windows * task.window
    return {
        "N": passes, "rounds": rounds, "step ms, bare": 1e3 * bare.sum() / (rounds * every),
        "tokens/s, bare": tokens / bare.sum(), "tokens/s, loop": tokens / looped.sum(),
        "loop / bare": float(bare.sum() / looped.sum()), "p10": float(low), "p90": float(high),
        "by CPU time": float(bare_cpu.sum() / looped_cpu.sum()),
    }  # fmt: skip


class _Turns:
    """Holds the loop every `TURN` steps between `first` and `last`, for as many bare steps."""

    def __init__(self, bare_step, first, last):
        self.looped, self.bare, self.ended = [], [], False
        self._bare_step, self._first, self._last = bare_step, first, last
        self._began = _now()

    def __call__(self, phase: str, step: int):
        turns = phase == "data" and self._first <= step <= self._last
        if not turns or (step - self._first) % TURN:
            return
        jax.block_until_ready(jax.live_arrays())
        if step > self._first:
            self.looped.append(_now() - self._began)
            began = _now()
            for _ in range(TURN):
                result = self._bare_step()
            jax.block_until_ready(result)
            self.bare.append(_now() - began)
        self.ended = step == self._last
        self._began = _now()


def _now() -> np.ndarray:
    """Seconds by the wall, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def _bare_step(config):
    task = tasks.make(config.task)
    step = make_train_step(
        config.model, config.training, task.window_passes(config.model.passes),
        task.scored_per_window,
    )  # fmt: skip
    state = jax.jit(lambda: init_train_state(config.model, config.training))()
    batch = jax.device_put(
        next(tasks.batches(task, "train", config.training.batch_size, num_batches=1))
    )

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    jax.block_until_ready(call())  # compiled
    return call
