"""What the training loop costs on depo_small: data, metrics, logs, heartbeats and checkpoints as
the experiment has them, against the bare compiled step.

They take turns of 50 steps, with the same executable on the same state: the loop is held, once it
has made batches ahead, while bare steps go on from where it is, on the batches of its turn. Each
round is one interval between checkpoints, 200 steps of each. "Loop / bare" is the throughput of the
loop over that of the bare step, of all rounds together; p10 and p90 are over rounds. "By CPU time"
is the same by the processor seconds of all threads, a lower bound, since data and checkpoints are
made by threads that may have a core of their own. On CPU it is at home with one thread for XLA:
NPROC=1 and the GLIBC_TUNABLES that `make benchmark` sets.
"""

import dataclasses
import pathlib
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from experiments import depo_small
from launch.benchmark.suites import Options
from launch.common import cli
from sleepnet import tasks
from sleepnet.config import MeshConfig
from sleepnet.training import loop
from sleepnet.training.program import Program

TAKES = ("repeats",)
TURN = 50
PASSES = (1, 4)
READ_AHEAD_SECONDS = 0.1  # after which the loop's threads have nothing left to do


def run(options: Options) -> dict:
    return {"rows": [_row(N, options.repeats) for N in PASSES]}


def _row(passes, rounds) -> dict:
    config = cli.experiment_config(depo_small.get_config())
    model = dataclasses.replace(config.model, passes=passes)
    every = config.training.checkpoint_every
    # Turns begin in the middle between two checkpoints: each round has all the work of one.
    first = every // 2
    training = dataclasses.replace(config.training, steps=first + rounds * every + 1)
    config = dataclasses.replace(config, model=model, mesh=MeshConfig(data=1), training=training)
    turns = _Turns(first)
    with (
        tempfile.TemporaryDirectory() as workdir,
        mock.patch.object(loop, "Program", turns.around),
    ):
        loop.train(config, pathlib.Path(workdir))
    rounded = (rounds, every // TURN, 2)
    looped, looped_cpu = np.reshape(turns.looped, rounded).sum(1).T
    bare, bare_cpu = np.reshape(turns.bare, rounded).sum(1).T
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
    """Holds the loop every `TURN` steps from step `first` on, for as many bare steps."""

    def __init__(self, first):
        self.looped, self.bare = [], []
        self._until_turn = first
        self._began = None
        self._seen = []

    def around(self, name, jitted, like, on_notice):
        """A training step that takes turns, in the place of the loop's own."""
        program = Program(name, jitted, like, on_notice)

        def call(state, *batch_and_ballots):
            if not self._until_turn:
                state = self._turn(program, state)
                self._until_turn, self._seen = TURN, []
            self._until_turn -= 1
            self._seen.append(batch_and_ballots)
            return program(state, *batch_and_ballots)

        return call

    def _turn(self, program, state):
        jax.block_until_ready(state)
        if self._began is not None:
            self.looped.append(_now() - self._began)
            time.sleep(READ_AHEAD_SECONDS)
            began, last = _now(), None
            for arguments in self._seen:  # one ahead, as the loop has them
                state, metrics = program(state, *arguments)
                jax.block_until_ready(last)
                last = metrics
            jax.block_until_ready(state)
            self.bare.append(_now() - began)
        self._began = _now()
        return state


def _now() -> np.ndarray:
    """Seconds by the wall, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])
