"""The training loop: data in, steps, metrics and checkpoints out; resumes where it stopped."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sleepnet import flops, storage, tasks
from sleepnet.config import ExperimentConfig, from_dict
from sleepnet.model import init_params
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.metrics import MetricsWriter
from sleepnet.training.step import TrainState, init_train_state, make_train_step

CONFIG, STARTS = "config.json", "starts.jsonl"
# What a run may change when it goes on: nothing that the losses depend on but for rounding.
FREE_SECTION = "evaluation"
FREE_FIELDS = (
    ("training", "checkpoint_every"), ("training", "checkpoints_kept"), ("model", "backend"),
)  # fmt: skip


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the checkpoint to return to."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, after a row of metrics."""

    step: int
    steps: int
    metrics: dict[str, float]
    tokens_per_second: float
    seconds_left: float


def train(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains until `config.training.steps`, from the last good checkpoint if there is one.

    Interrupted and resumed, a run ends bit-equal to one that never stopped: example i is a
    function of (task seed, i), step t takes examples t B .. (t + 1) B - 1, and all else is in
    the checkpoint.

    Args:
      workdir: made if needed; holds config.json, checkpoints and metrics.
      on_progress: called with each row of metrics.
      on_notice: called with what a person should know, such as a damaged checkpoint.
      should_stop: polled between steps; when true, a checkpoint is saved and train returns.

    Raises:
      StorageError: a workdir that cannot be written, or is of another config.
      TrainingError: the loss or the gradient is not finite.
    """
    claim_workdir(config, workdir)
    task = tasks.make(config.task)
    window_passes = task.window_passes(config.model.passes)
    train_step = make_train_step(
        config.model, config.training, window_passes, task.scored_per_window
    )
    checkpoints = Checkpoints(workdir, config.training.checkpoints_kept)
    start = jax.jit(lambda: init_train_state(config.model, config.training))
    restored, warnings = checkpoints.restore_latest(jax.eval_shape(start))
    for warning in warnings:
        on_notice(warning)
    if restored is not None:
        on_notice(f"resuming from step {int(restored.step)}")
    state = start() if restored is None else restored
    writer = MetricsWriter(workdir, last_step=int(state.step))
    clock = _Clock(config, window_passes, task, already=writer.seconds)
    try:
        return _run(config, task, train_step, state, checkpoints, writer, clock,
                    on_progress, should_stop)  # fmt: skip
    finally:
        writer.close()
        checkpoints.close()


def claim_workdir(config: ExperimentConfig, workdir: pathlib.Path):
    """Writes config.json into a new workdir, or raises StorageError if it holds another run."""
    workdir = pathlib.Path(workdir)
    storage.prepare_folder(workdir)
    if (workdir / CONFIG).exists():
        stored = load_config(workdir).to_dict()
        for path, was, now in _differences(stored, config.to_dict()):
            raise storage.StorageError(
                f"{workdir} holds a run with {path}={was!r}, and this one has {now!r}: "
                f"take another --workdir, or set {path} back"
            )
    elif Checkpoints.exist(workdir):
        raise storage.StorageError(
            f"{workdir} holds checkpoints but no {CONFIG} to tell of which run: "
            f"put it back, or take another --workdir"
        )
    storage.write_json(workdir / CONFIG, config.to_dict())


def load_config(workdir: pathlib.Path) -> ExperimentConfig:
    """The config with which a workdir was trained."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.exists():
        raise storage.StorageError(f"{workdir} is no workdir of a run: it has no {CONFIG}")
    return from_dict(storage.read_json(path))


def load_params(workdir: pathlib.Path, step: int | None = None) -> tuple[Any, int]:
    """Trained parameters of a workdir and their step, the last one by default."""
    config = load_config(workdir)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise storage.StorageError(f"{workdir} has no checkpoint yet: train it first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise storage.StorageError(
                f"{workdir} has no checkpoint of step {step}; it has {steps}"
            )
        like = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
        return checkpoints.restore_params(like, step), step


def _run(config, task, train_step, state, checkpoints, writer, clock, on_progress, should_stop):
    training, step = config.training, int(state.step)
    batches = tasks.batches(
        task, "train", training.batch_size, first_batch=step, num_batches=training.steps - step
    )
    waiting = None  # metrics of the last dispatched step, looked at while the next one runs
    for batch in batches:
        state, metrics = train_step(state, batch)
        if waiting is not None:
            _check_finite(waiting, step, checkpoints)
        step, waiting = step + 1, metrics
        clock.ticked(step)
        stopping = should_stop()
        last = step == training.steps
        if step % training.log_every == 0 or last:
            row = _check_finite(metrics, step, checkpoints)
            _log(config, row, step, writer, clock, on_progress)
        if stopping or last or step % training.checkpoint_every == 0:
            _check_finite(metrics, step, checkpoints)
            checkpoints.save(state)
        if stopping:
            break
    return state


def _check_finite(metrics, step, checkpoints) -> dict[str, float]:
    """Metrics as numbers; waits for the step. Raises TrainingError on NaN or infinity."""
    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
    bad = [key for key, value in values.items() if not np.isfinite(value)]
    if bad:
        checkpoints.wait()
        saved = [s for s in checkpoints.steps() if s < step]
        back = f"go back to {checkpoints.path(saved[-1])}" if saved else "no checkpoint is older"
        raise TrainingError(
            f"step {step}: {bad[0]} is {values[bad[0]]}; nothing of this step was saved: {back}. "
            f"A lower learning rate or training.clip_norm needs another --workdir"
        )
    return values


def _log(config, values, step, writer, clock, on_progress):
    training = config.training
    totals = {"tokens": step * clock.tokens_per_step, "flops": step * clock.flops_per_step}
    row = {**totals, **values}
    rate = clock.steps_per_second()
    tokens_per_second = rate * clock.tokens_per_step
    seconds = {"seconds": clock.seconds(), "tokens_per_second": tokens_per_second}
    writer.write(step, row, seconds)
    left = (training.steps - step) / rate if rate else float("nan")
    on_progress(Progress(step, training.steps, row, tokens_per_second, left))


class _Clock:
    """Wall time over all starts; and the speed of this one without its first, compiling step."""

    def __init__(self, config, window_passes, task, already):
        forward = flops.rollout_flops(config.model, window_passes, task.scored_per_window)
        self.flops_per_step = 3 * forward * config.training.batch_size
        self.tokens_per_step = config.training.batch_size * task.num_windows * task.window
        self._began = time.perf_counter() - already
        self._first = None
        self._steps = 0

    def ticked(self, step):
        if self._first is None:
            self._first = time.perf_counter()
            return
        self._steps += 1

    def seconds(self):
        return time.perf_counter() - self._began

    def steps_per_second(self):
        if self._first is None or not self._steps:
            return 0.0
        return self._steps / (time.perf_counter() - self._first)


def _differences(stored: dict, wanted: dict):
    for section, fields in wanted.items():
        if section == FREE_SECTION:
            continue
        for field in sorted(fields.keys() | stored[section].keys()):
            was, now = stored[section].get(field), fields.get(field)
            if was != now and (section, field) not in FREE_FIELDS:
                yield f"{section}.{field}", was, now
