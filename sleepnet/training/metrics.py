"""Metrics on disk: what is the same in every run of a config, apart from how fast it went.

`metrics.jsonl` has one row per `log_every` steps, and the row of a step is bit-equal
however often the run was interrupted. `timing.jsonl` has the wall clock. Both also go to
TensorBoard.
"""

import json
import pathlib

from tensorboardX import SummaryWriter

from sleepnet.storage import StorageError, write_atomic

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class MetricsWriter:
    """Appends rows to a run's files; rows beyond `last_step`, written before a crash, go."""

    def __init__(self, workdir: pathlib.Path, last_step: int):
        self._workdir = pathlib.Path(workdir)
        self.seconds = 0.0  # wall time of the rows that stay
        for name in (METRICS, TIMING):
            rows = [row for row in read_rows(self._workdir / name) if row["step"] <= last_step]
            write_atomic(self._workdir / name, "".join(_line(row) for row in rows))
            self.seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
        self._board = SummaryWriter(
            str(self._workdir / "tensorboard"), purge_step=last_step + 1, flush_secs=30
        )

    def write(self, step: int, metrics: dict[str, float], timing: dict[str, float]):
        """One row for each file."""
        for name, values in ((METRICS, metrics), (TIMING, timing)):
            with (self._workdir / name).open("a") as file:
                file.write(_line({"step": step, **values}))
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def close(self):
        self._board.close()


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows of a JSONL file; a last line that a crash cut short is left out.

    Raises:
      StorageError: an earlier line is damaged.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise StorageError(f"{path}, line {number} is damaged: mend or remove it") from None
    return rows


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"
