"""A profile of some steps, for TensorBoard, Perfetto or XProf."""

import pathlib

import jax

FOLDER = "profile"


class Profile:
    """Records the steps first .. last, if there are any, in workdir/profile."""

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
        self._folder = str(pathlib.Path(workdir) / FOLDER)
        self._first, self._last = steps or (0, 0)
        self._runs = False

    def before(self, step: int):
        """Step `step` is about to be dispatched."""
        if self._first <= step <= self._last and not self._runs:
            jax.profiler.start_trace(self._folder)
            self._runs = True

    def after(self, step: int, results):
        """It has been; `results` are still on their way."""
        if self._runs and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self):
        """Writes what was recorded, also of a run that ends early."""
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False
