"""How fast a run goes, and how far it has come: tokens and operations."""

import time

from sleepnet.experiment import ExperimentConfig
from sleepnet.nn import flops
from sleepnet.tasks import Task


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
