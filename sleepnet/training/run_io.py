"""What a run leaves on disk: rows of metrics, checkpoints, and the steps that it went back over."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from sleepnet import storage
from sleepnet.config import TrainingConfig
from sleepnet.storage import StorageError
from sleepnet.training import multihost
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.held_out import ACCURACY
from sleepnet.training.metrics import MetricsWriter, NoMetricsWriter, held_out_rows
from sleepnet.training.step import TrainState


class RunFiles:
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
        multihost.from_first(lambda: self._go_on_after(int(state.step) if state else 0))
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
        self._heed(lambda: self._rows.write(step, row, timing), stops=multihost.alone())

    def save(self, state: TrainState, *, wait: bool, metric: float | None = None):
        """A checkpoint, after the rows that lead up to it; as `Checkpoints.save`.

        Raises:
          StorageError: they cannot be written; always, if this is to wait until they are.
        """

        def write():
            multihost.together(self._rows.sync, "metrics cannot be written")
            self.checkpoints.save(state, metric=metric, wait=wait)

        if wait:  # whoever waits relies on it
            self.settle()  # earlier ones
            write()
        else:
            self._heed(write)

    def check(self):
        """Heeds a save that has failed by now, without waiting; with several processes, that is
        left to the next `save`."""
        if multihost.alone():
            self._heed(self.checkpoints.check)

    def settle(self):
        """Returns when no save is under way."""
        self._heed(self.checkpoints.wait)

    def close(self):
        self._rows.close()
        if multihost.alone():  # others may be elsewhere; where all end together, all is saved
            self.checkpoints.close()

    def _heed(self, write: Callable[[], None], stops: bool = True):
        try:
            write()
        except StorageError as error:
            if stops and self._stops:
                raise
            self._on_notice(f"{error}; the run goes on")


ROLLBACKS = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class Rollback:
    """From a bad step, whose batch and losses are told, back to the state after step `to`."""

    bad_step: int
    to: int
    batch: int
    loss: float
    grad_norm: float


class Rollbacks:
    """The rollbacks of a run, in its workdir; they say which batch each step takes.

    After a rollback step `to` + 1 takes the batch after the bad one, and so on: none is met again.
    What process 0 finds there holds for all, and it writes for all.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = pathlib.Path(workdir) / ROLLBACKS
        stored = multihost.from_first(
            lambda: storage.read_json(self._path) if self._path.exists() else []
        )
        self.all = [Rollback(**values) for values in stored]

    def __len__(self) -> int:
        return len(self.all)

    def batch_of(self, step: int) -> int:
        """The number of the batch that step `step` takes; step 1 is the first."""
        for back in reversed(self.all):  # the last one that this step comes behind
            if back.to < step:
                return back.batch + step - back.to
        return step - 1

    def spans(self, done: int, steps: int) -> Iterator[tuple[int, int]]:
        """(first batch, number of batches), in order, of the steps done + 1 .. steps."""
        cuts = sorted({back.to for back in self.all if done < back.to < steps})
        for start, stop in zip((done, *cuts), (*cuts, steps), strict=True):
            yield self.batch_of(start + 1), stop - start

    def add(self, back: Rollback):
        """Remembers one; raises StorageError."""
        self.all.append(back)
        stored = [dataclasses.asdict(one) for one in self.all]
        multihost.from_first(lambda: storage.write_json(self._path, stored))
