"""Runs read back from their workdirs, and which of them belong together."""

import dataclasses
import functools
import pathlib

from sleepnet import strict_json
from sleepnet.evaluation import record
from sleepnet.experiment import ExperimentConfig
from sleepnet.storage import StorageError
from sleepnet.training.metrics import METRICS, TIMING, read_metrics, read_rows
from sleepnet.training.workdir import STARTS, fixed_fields, load_config

# Within a group, runs differ in these alone.
_VARIED = (("training", "seed"), ("model", "passes"), ("model", "gradient_passes"))


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir, up to the step at which it was evaluated.

    Attributes:
      workdir: as it was given.
      config: of the run.
      evaluation: the record of `launch.evaluate`.
      metrics: rows of metrics.jsonl.
      seconds: wall time of training, all starts together; None if it was not logged.
      arguments: of `launch.train` at the first start; None if it was not started so.
    """

    workdir: pathlib.Path
    config: ExperimentConfig
    evaluation: dict
    metrics: list[dict]
    seconds: float | None
    arguments: list[str] | None

    @property
    def trained(self) -> int:
        """N in training."""
        return self.config.model.passes

    @property
    def gradient_passes(self) -> int:
        """How many of the N gradients ran through: k."""
        return self.trained - self.config.model.detached_passes(self.trained)

    @property
    def name(self) -> str:
        """How it was trained: N, and k if below."""
        all_passes = self.gradient_passes == self.trained
        return f"N = {self.trained}" + ("" if all_passes else f", k = {self.gradient_passes}")

    @property
    def seed(self) -> int:
        """Of training."""
        return self.config.training.seed

    @property
    def step(self) -> int:
        """At which it was evaluated."""
        return self.evaluation["step"]

    def spent(self, what: str) -> float:
        """Training's "tokens" or "flops" up to the evaluated step; both are linear in steps."""
        row = self.metrics[-1]
        return row[what] * self.step / row["step"]

    @functools.cached_property
    def shared_config(self) -> dict:
        """What it has in common with its group: all that its numbers depend on but N, k, seed."""
        sections = fixed_fields(self.config)
        for section, field in _VARIED:
            del sections[section][field]
        return sections


def load_run(workdir: pathlib.Path) -> Run:
    """Reads config.json, evaluation.json, metrics.jsonl, timing.jsonl and starts.jsonl.

    Raises:
      StorageError: one that is needed is missing, cannot be read or is of another run.
    """
    workdir = pathlib.Path(workdir)
    config = load_config(workdir)
    evaluation = record.load(workdir, config)
    if config.task.name == "text":
        raise StorageError(
            f"{workdir} is a run on text: the report tells of answers by depth, and text has none; "
            f"launch.evaluate prints its loss, perplexity and bits per byte"
        )
    metrics = _up_to(evaluation["step"], read_metrics(workdir))
    if not metrics:
        raise StorageError(
            f"{workdir / METRICS} has no row up to step {evaluation['step']}: the run is damaged"
        )
    timing = _up_to(evaluation["step"], read_rows(workdir / TIMING))
    starts = read_rows(workdir / STARTS)
    arguments = starts[0]["command"][1:] if starts else None
    seconds = timing[-1]["seconds"] if timing else None
    return Run(workdir, config, evaluation, metrics, seconds, arguments)


def group_runs(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ only in N, k and seed, sorted by them; groups in the order given.

    Raises:
      StorageError: two runs of a group that cannot be averaged.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(strict_json.dumps(run.shared_config, sort_keys=True), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: (run.trained, run.gradient_passes, run.seed))
        _check_group(group)
    return list(groups.values())


def _check_group(group: list[Run]):
    seen = {}
    for run in group:
        other = seen.setdefault((run.name, run.seed), run)
        if other is not run:
            raise StorageError(
                f"{other.workdir} and {run.workdir} are the same run ({run.name}, seed "
                f"{run.seed}): give one of them"
            )
    first = group[0]
    for run in group[1:]:
        if run.step != first.step:
            raise StorageError(
                f"{first.workdir} was evaluated at step {first.step} and {run.workdir} at step "
                f"{run.step}: evaluate both at one, with python -m launch.evaluate --step"
            )


def _up_to(step: int, rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["step"] <= step]
