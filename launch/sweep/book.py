"""What has become of each run, read from its workdir; and the table of all."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from launch.sweep.space import Run
from sleepnet import storage, strict_json
from sleepnet.evaluation import record
from sleepnet.evaluation.markdown import table
from sleepnet.training.metrics import TIMING, read_metrics, read_rows
from sleepnet.training.workdir import CONFIG, differences, load_config

DONE, FAILED, STOPPED, WAITING = "done", "failed", "stopped", "waiting"
ROWS, TABLE, LOG = "sweep.jsonl", "sweep.md", "train.log"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass
class Row:
    """A line of the table; numbers are of the last logged step."""

    run: str
    fields: dict[str, str]
    status: str = WAITING
    step: int = 0
    loss: float | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    seconds: float = 0.0
    error: str = ""


def is_done(run: Run, workdir: pathlib.Path) -> bool:
    """Whether the workdir holds this very run, trained and saved to its last step."""
    if not storage.exists(workdir / CONFIG):
        return False
    if any(differences(load_config(workdir).to_dict(), run.config.to_dict())):
        return False
    rows = read_metrics(workdir)
    steps = run.config.training.steps
    saved = [p.name for p in (workdir / CHECKPOINTS).glob("*")]
    return bool(rows) and rows[-1]["step"] == steps and str(steps) in saved


def is_evaluated(run: Run, workdir: pathlib.Path) -> bool:
    return _test_accuracy(run, workdir) is not None


def look(run: Run, workdir: pathlib.Path, status: str, error: str = "") -> Row:
    row = Row(run.name, run.fields, status, error=error)
    if trained := [step for step in read_metrics(workdir) if "loss" in step]:
        row.step, row.loss = trained[-1]["step"], trained[-1]["loss"]
        row.accuracy = trained[-1]["accuracy"]
    if timing := read_rows(workdir / TIMING):
        row.seconds = timing[-1]["seconds"]
    row.test_accuracy = _test_accuracy(run, workdir)
    return row


def _test_accuracy(run: Run, workdir: pathlib.Path) -> float | None:
    """Over all depths, at the trained N and the last step."""
    try:
        stored = record.load(workdir, run.config)
    except storage.StorageError:
        return None
    if stored["step"] != run.config.training.steps:
        return None
    passes = run.config.model.passes
    return next((result["accuracy"] for result in stored["results"]
                 if result["passes"] == passes and result["depth"] is None), None)  # fmt: skip


def write(folder: pathlib.Path, rows: Sequence[Row]):
    """sweep.jsonl and sweep.md, whole at any moment."""
    lines = "".join(strict_json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
    storage.write_atomic(folder / ROWS, lines)
    storage.write_atomic(folder / TABLE, markdown(rows) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    fields = list(rows[0].fields)
    header = [*fields, "status", "step", "loss", "accuracy", "test accuracy", "wall time"]
    return table(header, [
        [*(row.fields[field] for field in fields), row.status, str(row.step), _number(row.loss),
         _number(row.accuracy), _number(row.test_accuracy), duration(row.seconds)]
        for row in rows
    ])  # fmt: skip


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
