"""Metrics on disk: what is the same in every run of a config, apart from how fast it went.

`metrics.jsonl` has one row per `log_every` steps, and a second one, of what was held out, where a
step was evaluated; they are bit-equal however often the run was interrupted. `timing.jsonl` has
the wall clock. Both also go to TensorBoard. Lines are `strict_json`: a loss that is not a number
is the string "NaN".
"""

import contextlib
import os
import pathlib

from sleepnet import strict_json
from sleepnet.storage import StorageError, write_atomic
from sleepnet.training import board

METRICS, TIMING, BOARD = "metrics.jsonl", "timing.jsonl", "tensorboard"
HELD_OUT = "test_"  # begins the names of what was measured on held-out examples


class MetricsWriter:
    """Appends rows to a run's files; rows beyond `last_step`, written before a crash, go.

    Raises:
      StorageError: a file cannot be written, or has a damaged row.
    """

    def __init__(self, workdir: pathlib.Path, last_step: int):
        workdir = pathlib.Path(workdir)
        self._metrics, self._timing = (
            _Appended(_up_to(last_step, workdir / name)) for name in (METRICS, TIMING)
        )
        self._board = _Appended(workdir / BOARD / board.file_name())
        self._board.put(board.begin(last_step + 1))
        self._files = self._metrics, self._timing, self._board

    def write(self, step: int, metrics: dict[str, float], timing: dict[str, float]):
        """One row for each file; without timing, for the metrics alone.

        Raises:
          StorageError: they cannot be written now, and wait for the next `write` or `sync`.
        """
        self._metrics.put(_line({"step": step, **metrics}))
        if timing:
            self._timing.put(_line({"step": step, **timing}))
        self._board.put(board.scalars(step, metrics | timing))
        for file in self._files:
            file.flush()

    def sync(self):
        """Returns when all rows lie on the disk: a checkpoint may then follow.

        Raises:
          StorageError: some cannot be written.
        """
        for file in self._files:
            file.sync()

    def close(self):
        """Rows that the disk refuses are lost; they are of steps that no checkpoint has."""
        for file in self._files:
            file.close()


class NoMetricsWriter:
    """Of processes other than the first, which writes for all."""

    def write(self, step, metrics, timing):
        pass

    def sync(self):
        pass

    def close(self):
        pass


class _Appended:
    """A file to append to, record by whole record."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        with self._named_errors():
            path.parent.mkdir(exist_ok=True)
            self._file = path.open("ab", buffering=0)
        self._waiting = b""  # records that the disk has not taken yet

    def put(self, records: bytes):
        """For the next `flush`."""
        self._waiting += records

    def flush(self):
        with self._named_errors():
            self._flush()

    def sync(self):
        with self._named_errors():
            self._flush()
            os.fsync(self._file.fileno())

    def close(self):
        with contextlib.suppress(OSError):
            self._flush()
        self._file.close()

    def _flush(self):
        whole = os.fstat(self._file.fileno()).st_size
        left = self._waiting
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(whole)  # no half of a record stays
            raise
        self._waiting = b""

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error


def _up_to(last_step: int, path: pathlib.Path) -> pathlib.Path:
    """The JSONL file without the rows of later steps."""
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    write_atomic(path, b"".join(map(_line, rows)))
    return path


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl, one for each step; what was held out joins the step's row."""
    by_step: dict[int, dict] = {}
    for row in read_rows(pathlib.Path(workdir) / METRICS):
        by_step.setdefault(row["step"], {}).update(row)
    return list(by_step.values())


def held_out_rows(workdir: pathlib.Path) -> dict[int, dict]:
    """By step, the rows of metrics.jsonl that have what was held out."""
    return {
        row["step"]: row
        for row in read_metrics(workdir)
        if any(key.startswith(HELD_OUT) for key in row)
    }


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
            rows.append(strict_json.loads(line))
        except ValueError:
            if number < len(lines):
                raise StorageError(f"{path}, line {number} is damaged: mend or remove it") from None
    return rows


def _line(row: dict) -> bytes:
    return strict_json.dumps(row).encode() + b"\n"
