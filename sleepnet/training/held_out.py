"""Loss and accuracy on held-out examples while a run trains, by the rollout that trains it."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet import tasks
from sleepnet.experiment import ExperimentConfig
from sleepnet.training import sharding
from sleepnet.training.metrics import HELD_OUT
from sleepnet.training.multihost import STOP, StopFlags, with_stop_flags
from sleepnet.training.program import Program
from sleepnet.training.step import score

LOSS, ACCURACY = f"{HELD_OUT}loss", f"{HELD_OUT}accuracy"


class HeldOut:
    """Measures the first `training.evaluate_examples` examples of the test split, each once."""

    def __init__(self, config: ExperimentConfig, task, mesh, stop_flags: StopFlags):
        self._config, self._task, self._mesh, self._stop_flags = config, task, mesh, stop_flags
        self._program = None

    def compile(self, params, on_notice: Callable[[str], None]):
        """Before the first `measure`."""
        like = params, next(self._batches()), self._stop_flags.flags()
        sums = _sums(self._config, self._task, self._mesh)
        program = jax.jit(with_stop_flags(lambda *arguments: ((), sums(*arguments))))
        self._program = Program("held-out measurement", program, like, on_notice)

    def measure(self, params, on_batch: Callable[[], None]) -> dict[str, float] | None:
        """test_loss (nats per scored position) and test_accuracy (share of positions that are
        right); None if a process was asked to stop meanwhile.

        Args:
          on_batch: called before each batch.
        """
        assert self._program is not None, "compile first"
        totals, waiting = np.zeros(3), None
        for batch in self._batches():
            on_batch()
            _, sums = self._program(params, batch, self._stop_flags.flags())
            if waiting is not None:
                totals += _counted(waiting)
                if self._stop_flags.asked() or waiting[STOP]:
                    return None
            waiting = sums
        nll, right, scored = totals + _counted(waiting)
        return {LOSS: nll / scored, ACCURACY: right / scored}

    def _batches(self) -> Iterator[tasks.Example]:
        """All of one size, and so one program; what is too much in the last bears no score."""
        size = self._config.training.batch_size
        wanted = self._task.num_distinct("test", self._config.training.evaluate_examples)
        rows = range(size) if self._mesh is None else sharding.local_rows(self._mesh, size)
        batches = tasks.batches(
            self._task, "test", size, num_batches=-(-wanted // size), rows=tuple(rows)
        )
        for number, batch in enumerate(batches):
            counts_B = number * size + np.asarray(rows) < wanted
            batch = batch._replace(mask_WL=batch.mask_WL & counts_B[:, None, None])
            yield batch if self._mesh is None else sharding.place_batch(self._mesh, batch, size)


def _sums(config: ExperimentConfig, task, mesh) -> Callable:
    """(params, batch) -> sums over the scored positions of all rows."""

    def sums(params, rows):
        seen = score(
            params, rows, model=config.model,
            window_passes=task.window_passes(config.model.passes),
            scored_per_window=task.scored_per_window,
        )  # fmt: skip
        right = (seen.prediction_BWL == rows.targets_WL) & rows.mask_WL
        parts = jnp.sum(seen.nll_BWL), jnp.sum(right), jnp.sum(rows.mask_WL)
        return dict(zip(("nll", "right", "scored"), parts, strict=True))

    if mesh is None or mesh.size == 1:
        return sums
    return sharding.over_rows(
        mesh, sums, gather=config.mesh.gather, dtype=config.model.compute_dtype
    )


def _counted(sums) -> np.ndarray:
    values = jax.device_get(sums)
    return np.array([values["nll"], values["right"], values["scored"]], np.float64)
