"""`evaluation.json`: what was measured on one run, in its workdir.

Plain JSON, version 3:
  version, step, trained_passes, split, depth_name;
  measured: what tells it from any other run: config, but for what a run may change, and params, a
    digest;
  request: passes, examples and streaming_examples, as asked;
  results: one `DepthResult` per N and depth, depth null for all depths together; of text, one
    `LossResult` per N and window of a document, null for all;
  agreement: an `Agreement` at the trained N, or null;
  latency: null, or batch_size, prefill (median_ms and p90_ms), wake (rows of passes, windows and
    the same) and sleep (rows of passes and the same);
  machine: see `describe_machine`.
"""

import dataclasses
import pathlib
from collections.abc import Callable

from sleepnet import storage, strict_json, tasks
from sleepnet.config import ConfigError
from sleepnet.evaluation.accuracy import evaluate
from sleepnet.evaluation.latency import Timing, sleep_latency, wake_latency
from sleepnet.evaluation.likelihood import evaluate_text
from sleepnet.evaluation.machine import describe_machine
from sleepnet.evaluation.streaming import agreement
from sleepnet.experiment import ExperimentConfig, from_dict
from sleepnet.inference.snapshot import fingerprint
from sleepnet.training.workdir import differences, fixed_fields

FILE, VERSION, SPLIT = "evaluation.json", 3, "test"
_LATENCY_BATCH = 1


def widen(
    config: ExperimentConfig, passes: tuple[int, ...] | None = None, examples: int | None = None
) -> ExperimentConfig:
    """The config with what to evaluate; the trained N always belongs to it.

    Raises:
      ConfigError: numbers that cannot be.
    """
    given = {"passes": passes, "examples": examples}
    changes = {name: value for name, value in given.items() if value is not None}
    evaluation = dataclasses.replace(config.evaluation, **changes)
    every_passes = tuple(sorted({*evaluation.passes, config.model.passes}))
    evaluation = dataclasses.replace(evaluation, passes=every_passes)
    return dataclasses.replace(config, evaluation=evaluation)


def measure(
    params,
    config: ExperimentConfig,
    step: int,
    *,
    latency: bool = True,
    on_notice: Callable[[str], None] = lambda _: None,
) -> dict:
    """Measures all that `config.evaluation` names; the record to store.

    Args:
      config: from `widen`.
      step: of training, to which `params` belong.
      latency: whether to take times, too.
      on_notice: told what is measured next.
    """
    task = tasks.make(config.task)
    of_passes = evaluate_text if isinstance(task, tasks.Text) else evaluate
    results = []
    for passes in config.evaluation.passes:
        on_notice(f"held-out examples with N = {passes}")
        results += of_passes(params, config, passes, split=SPLIT)
    agreed = None
    if config.evaluation.streaming_examples:
        on_notice("streaming against rollout")
        agreed = dataclasses.asdict(agreement(params, config))
    timings = None
    if latency:
        on_notice("latency")
        timings = _latency(params, config)
    return {
        "version": VERSION,
        "step": step,
        "trained_passes": config.model.passes,
        "split": SPLIT,
        "measured": identity(params, config),
        "depth_name": task.depth_name,
        "request": _request(config),
        "results": [dataclasses.asdict(result) for result in results],
        "agreement": agreed,
        "latency": timings,
        "machine": describe_machine(),
    }


def save(workdir: pathlib.Path, record: dict):
    """Writes evaluation.json; readers see the old one or the new one."""
    storage.write_json(pathlib.Path(workdir) / FILE, record)


def load(workdir: pathlib.Path, config: ExperimentConfig) -> dict:
    """The record of a workdir.

    Args:
      config: of the run that it must be of.

    Raises:
      StorageError: there is none, or it is of another version or run; names the command to run.
    """
    path = pathlib.Path(workdir) / FILE
    command = f"python -m launch.evaluate --workdir={workdir}"
    if not storage.exists(path):
        raise storage.StorageError(f"{workdir} has no {FILE}: run {command}")
    record = storage.read_json(path)
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise storage.StorageError(
            f"{path} has version {version} and this program reads {VERSION}: run {command} --again"
        )
    if other := _other_run(record["measured"], config):
        raise storage.StorageError(f"{path} was measured on another run ({other}): run {command}")
    return record


def find(
    workdir: pathlib.Path, params, config: ExperimentConfig, step: int, *, latency: bool
) -> dict | None:
    """The stored record if `measure` would be asked for the same again, else None.

    Times count only on the machine on which they were taken.
    """
    try:
        record = load(workdir, config)
    except storage.StorageError:
        return None
    same = record["step"] == step and record["request"] == _request(config)
    if not same or not is_of(record["measured"], params, config):
        return None
    timed = record["latency"] and record["machine"] == describe_machine()
    return record if timed or not latency else None


def identity(params, config: ExperimentConfig) -> dict:
    """Return what tells these parameters of this run from any other, for JSON.

    The config has the fingerprints of the data, where a task reads files.
    """
    return {"config": fixed_fields(config), "params": fingerprint(params)}


def is_of(measured: dict, params, config: ExperimentConfig) -> bool:
    """Return whether a stored `identity` is that of these parameters of this run."""
    return measured["params"] == fingerprint(params) and not _other_run(measured, config)


def _other_run(measured: dict, config: ExperimentConfig) -> str | None:
    """What tells the run of a stored `identity` from this one; None: nothing."""
    try:
        stored = strict_json.as_strings(measured["config"])
        stored = from_dict(stored)  # with the defaults of fields that were added since
    except ConfigError as error:
        return str(error)
    found = differences(stored.to_dict(), config.to_dict())
    return next((f"{path} was {was!r} and is {now!r}" for path, was, now in found), None)


def _request(config):
    evaluation = config.evaluation
    return {
        "passes": list(evaluation.passes),
        "examples": evaluation.examples,
        "streaming_examples": evaluation.streaming_examples,
    }


def _latency(params, config):
    passes = config.evaluation.passes
    wake = wake_latency(params, config.model, passes=passes, batch_size=_LATENCY_BATCH)
    # Up to twice the largest N, so that the slope shows beyond what was trained.
    sleep = sleep_latency(
        params, config.model, (*passes, 2 * passes[-1]), batch_size=_LATENCY_BATCH
    )
    return {
        "batch_size": _LATENCY_BATCH,
        "prefill": _times(sleep.prefill),
        "wake": [
            {"passes": N, "windows": windows, **_times(timing)}
            for (N, windows), timing in wake.items()
        ],
        "sleep": [{"passes": N, **_times(timing)} for N, timing in sleep.sleep.items()],
    }


def _times(timing: Timing) -> dict[str, float]:
    return {"median_ms": timing.median_ms, "p90_ms": timing.p90_ms}
