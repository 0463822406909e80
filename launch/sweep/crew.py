"""Brings the runs of a sweep to their end, some at a time, each in a process of its own."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from launch.sweep import book
from launch.sweep.book import DONE, FAILED, LOG, STOPPED, Row
from launch.sweep.space import Run

GRACE = 60.0  # seconds in which a run that is asked to stop saves its checkpoint
USER_ERROR = 2  # exit code of what no retry mends
PAUSE = 0.2


@dataclasses.dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    evaluating: bool = False
    failures: int = 0


class Crew:
    """Works through runs.

    Args:
      train, evaluate: the command for a run and its workdir; evaluate None: train alone.
      parallel: how many at a time.
      retries: how often a run that failed is begun again; it goes on from its last checkpoint.
      say: takes a line for each run that ends.
      should_stop: polled; when true, runs are asked to save and stop.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        train: Callable[[Run, pathlib.Path], list[str]],
        evaluate: Callable[[Run, pathlib.Path], list[str]] | None = None,
        parallel: int = 1,
        retries: int = 1,
        say: Callable[[str], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self._folder, self._train, self._evaluate = folder, train, evaluate
        self._parallel, self._retries = parallel, retries
        self._say, self._should_stop = say, should_stop

    def work(self, runs: Sequence[Run]) -> list[Row]:
        """Rows of all runs, in order; those that were done before are left as they are."""
        self._rows = {run.name: book.look(run, self._folder / run.name, book.WAITING)
                      for run in runs}  # fmt: skip
        self._total, self._ended = len(runs), 0
        waiting, children = list(runs), []
        try:
            while waiting or children:
                if self._should_stop():
                    self._stop(children)
                    break
                while waiting and len(children) < self._parallel:
                    children += self._begin(waiting.pop(0))
                children = [child for child in children if not self._ended_for_good(child)]
                time.sleep(PAUSE)
        finally:
            self._kill(children)
        self._write()
        return list(self._rows.values())

    def _begin(self, run: Run) -> list[_Child]:
        """The process that a run still needs: training, evaluation or none."""
        workdir = self._folder / run.name
        if not book.is_done(run, workdir):
            return [_Child(run, self._start(self._train(run, workdir), workdir))]
        if self._evaluate and not book.is_evaluated(run, workdir):
            process = self._start(self._evaluate(run, workdir), workdir)
            return [_Child(run, process, evaluating=True)]
        self._end(run, DONE, before=True)
        return []

    def _start(self, command: list[str], workdir: pathlib.Path) -> subprocess.Popen:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / LOG).open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes once, through us
            )  # fmt: skip

    def _ended_for_good(self, child: _Child) -> bool:
        """Sees to a child that may have ended; begins again, or evaluates, where that is due."""
        code = child.process.poll()
        if code is None:
            return False
        workdir = self._folder / child.run.name
        if code == 0 and not child.evaluating and self._evaluate:
            command = self._evaluate(child.run, workdir)
        elif code == 0:
            self._end(child.run, DONE)
            return True
        elif code != USER_ERROR and child.failures < self._retries:
            child.failures += 1
            self._say(f"{child.run.name} ended with code {code}; again")
            again = self._evaluate if child.evaluating and self._evaluate else self._train
            command = again(child.run, workdir)
        else:
            self._end(child.run, FAILED, _last_words(workdir / LOG, code))
            return True
        child.evaluating |= code == 0
        child.process = self._start(command, workdir)
        return False

    def _end(self, run: Run, status: str, error: str = "", before: bool = False):
        row = book.look(run, self._folder / run.name, status, error)
        self._rows[run.name] = row
        self._ended += 1
        figures = ""
        if row.loss is not None:
            figures = f", loss {row.loss:.3f}, accuracy {row.accuracy:.3f}"
        took = f", {book.duration(row.seconds)}" if row.seconds else ""
        note = " before" if before else f": {error}" if error else ""
        left = f"; about {book.duration(self._seconds_left())} left" if not before else ""
        self._say(f"[{self._ended}/{self._total}] {run.name} {status}{note}{figures}{took}{left}")
        self._write()

    def _seconds_left(self) -> float:
        """At the pace of the runs that are done; those under way are counted as not begun."""
        took = [row.seconds for row in self._rows.values() if row.status == DONE]
        rest = self._total - self._ended
        return rest * sum(took) / max(1, len(took)) / min(self._parallel, max(1, rest))

    def _stop(self, children: Sequence[_Child]):
        """Asks all to save and end, and waits for that."""
        for child in children:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for child in children:
            try:
                child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue  # `_kill` ends it
            workdir = self._folder / child.run.name
            self._rows[child.run.name] = book.look(child.run, workdir, STOPPED)

    def _kill(self, children: Sequence[_Child]):
        for child in children:
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()

    def _write(self):
        book.write(self._folder, list(self._rows.values()))


def _last_words(log: pathlib.Path, code: int) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"code {code}: {lines[-1][-300:] if lines else 'it said nothing'}; see {log}"
