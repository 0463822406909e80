"""Steps that a run went back over, and the batches that it left out for it."""

import dataclasses
import pathlib
from collections.abc import Iterator

from sleepnet import storage
from sleepnet.training import agree

FILE = "rollbacks.json"


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
        self._path = pathlib.Path(workdir) / FILE
        stored = agree.from_first(
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
        agree.from_first(lambda: storage.write_json(self._path, stored))
