"""What a run leaves on disk: rows of metrics, and the checkpoints that they lead up to."""

import pathlib
from collections.abc import Callable
from typing import Any

from sleepnet.config import TrainingConfig
from sleepnet.storage import StorageError
from sleepnet.training import agree
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.held_out import ACCURACY
from sleepnet.training.metrics import MetricsWriter, NoMetricsWriter, held_out_rows
from sleepnet.training.step import TrainState


class Ledger:
    """Rows and checkpoints of one run; all processes call each method, and the first writes rows.

    What cannot be written stops the run, or is told, by `training.on_save_error`.

    Args:
      on_notice: called with what a person should know, such as a damaged checkpoint.
    """

    def __init__(
        self, training: TrainingConfig, workdir: pathlib.Path, on_notice: Callable[[str], None]
    ):
        self.checkpoints = Checkpoints(workdir, training.checkpoints_kept, training.best_kept)
        self._rows: Any = NoMetricsWriter()
        self._stops = training.on_save_error == "stop"
        self._workdir, self._on_notice = workdir, on_notice

    def restore(self, like: TrainState) -> TrainState | None:
        """The last good checkpoint, with a notice for each that is not; rows end with it.

        Raises:
          StorageError: there are checkpoints and none can be read, or a row is damaged.
        """
        state, warnings = self.checkpoints.restore_latest(like)
        for warning in warnings:  # the damage may lie in the part of any process
            self._on_notice(warning)
        agree.from_first(lambda: self._go_on_after(int(state.step) if state else 0))
        return state

    def _go_on_after(self, step: int):
        self._rows.close()
        self._rows = MetricsWriter(self._workdir, step)
        for rated, values in held_out_rows(self._workdir).items():
            self.checkpoints.rate(rated, values[ACCURACY])

    def write(self, step: int, row: dict[str, float], timing: dict[str, float]):
        """A row of metrics, and one of how fast it went, if that is given.

        With several processes, all of them learn at the next `save` of rows that were refused.
        """
        self._heed(lambda: self._rows.write(step, row, timing), stops=agree.alone())

    def save(self, state: TrainState, *, wait: bool, metric: float | None = None):
        """A checkpoint, after the rows that lead up to it; as `Checkpoints.save`.

        Raises:
          StorageError: they cannot be written; always, if this is to wait until they are.
        """

        def write():
            agree.together(self._rows.sync, "metrics cannot be written")
            self.checkpoints.save(state, metric=metric, wait=wait)

        if wait:  # whoever waits relies on it
            self.settle()  # earlier ones
            write()
        else:
            self._heed(write)

    def check(self):
        """Heeds a save that has failed by now, without waiting; with several processes, that is
        left to the next `save`."""
        if agree.alone():
            self._heed(self.checkpoints.check)

    def settle(self):
        """Returns when no save is under way."""
        self._heed(self.checkpoints.wait)

    def close(self):
        self._rows.close()
        if agree.alone():  # others may be elsewhere; where all end together, all is saved
            self.checkpoints.close()

    def _heed(self, write: Callable[[], None], stops: bool = True):
        try:
            write()
        except StorageError as error:
            if stops and self._stops:
                raise
            self._on_notice(f"{error}; the run goes on")
