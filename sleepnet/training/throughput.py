"""Where the wall time of a run goes, over all its starts, and how fast it goes."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable

from sleepnet import storage
from sleepnet.experiment import ExperimentConfig
from sleepnet.nn import flops
from sleepnet.tasks import Task

CLOCK = "clock.json"
LONG = ("start", "restore", "compile")  # phases of one call, that may take any time
STEP, REPEATED = "step", "repeated"  # a repeated step was already taken before a crash or rollback


class Clock:
    """Adds up seconds by phase. Goodput is the share that went into steps taken for the first time.

    A kill loses the seconds since the last `save`; the time between two starts is not counted.

    Args:
      now: seconds by a clock that only goes forward.
    """

    def __init__(self, workdir: pathlib.Path, now: Callable[[], float] = time.monotonic):
        self._path = pathlib.Path(workdir) / CLOCK
        self.now = now
        stored = {}
        with contextlib.suppress(storage.StorageError):  # statistics keep no run from going on
            stored = storage.read_json(self._path)
        self._spent: dict[str, float] = stored.get("spent", {})
        self._farthest: int = stored.get("farthest", 0)
        self._lock = threading.Lock()
        self.phase, self.step = "start", 0
        self.last_sign = self._counted = now()

    def enter(self, phase: str, step: int):
        """The phase before ends. Every call is a sign of life."""
        with self._lock:
            self._count()
            if self.phase == STEP:
                self._farthest = max(self._farthest, self.step)
            self.phase, self.step = phase, step
            self.last_sign = self._counted

    def silent_for(self) -> float:
        """Seconds since the last sign of life."""
        return self.now() - self.last_sign

    def timing(self) -> dict[str, float]:
        """For timing.jsonl: seconds in all and by phase, and the goodput."""
        with self._lock:
            self._count()
            spent = dict(self._spent)
        total = sum(spent.values())
        by_phase = {f"seconds_{phase}": seconds for phase, seconds in sorted(spent.items())}
        return {"seconds": total, "goodput": spent.get(STEP, 0.0) / total, **by_phase}

    def save(self):
        """Writes clock.json; raises StorageError."""
        with self._lock:
            self._count()
            kept = {"farthest": self._farthest, "spent": dict(self._spent)}
        storage.write_json(self._path, kept)

    def _count(self):
        now = self.now()
        repeated = self.phase == STEP and self.step <= self._farthest
        name = REPEATED if repeated else self.phase
        self._spent[name] = self._spent.get(name, 0.0) + now - self._counted
        self._counted = now


class Pace:
    """Steps per second of this start, from the end of its first step on."""

    def __init__(self, config: ExperimentConfig, task: Task):
        window_passes = task.window_passes(config.model.passes)
        of_row = flops.training_flops(config.model, window_passes, task.scored_per_window)
        self._flops_per_step = of_row * config.training.batch_size
        self._tokens_per_step = config.training.batch_size * task.num_windows * task.window
        self._first = None
        self._steps = 0

    def ticked(self):
        """Another step is on its way."""
        if self._first is None:
            self._first = time.perf_counter()
        else:
            self._steps += 1

    def totals(self, step: int) -> dict[str, float]:
        """Tokens and FLOPs of training up to a step."""
        return {"tokens": step * self._tokens_per_step, "flops": step * self._flops_per_step}

    def tokens_per_second(self) -> float:
        """0 until it is known."""
        return self._rate() * self._tokens_per_step

    def seconds_for(self, steps: int) -> float:
        """How long so many steps will take; NaN until it is known."""
        rate = self._rate()
        return steps / rate if rate else float("nan")

    def _rate(self):
        if self._first is None or not self._steps:
            return 0.0
        return self._steps / (time.perf_counter() - self._first)
