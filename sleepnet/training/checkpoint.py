"""Checkpoints through Orbax, each array with a digest. The only file that names Orbax."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from sleepnet import storage
from sleepnet.training.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`, the newest `kept` of them."""

    def __init__(self, workdir: pathlib.Path, kept: int | None = None, keep_best: int = 0):
        self.folder = pathlib.Path(workdir).resolve() / FOLDER
        self._kept = kept
        self._manager = self._open()

    @staticmethod
    def exist(workdir: pathlib.Path) -> bool:
        """Whether a folder holds any."""
        folder = pathlib.Path(workdir) / FOLDER
        return folder.is_dir() and any(folder.iterdir())

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def check(self):
        pass

    def wait(self):
        pass

    def discard_after(self, step: int):
        """Deletes the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def save(self, state: TrainState, *, metric=None, wait=False):
        """Writes a checkpoint; returns when it is whole on disk."""
        step = int(state.step)
        if step in self.steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            digests=ocp.args.JsonSave(storage.digests(state)),
        )
        self._manager.save(step, args=items)

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of one step, verified.

        Args:
          like: a state of the same structure, or its shapes and dtypes.

        Raises:
          StorageError: a checkpoint that is damaged, or of another model.
        """
        source = f"checkpoint {self.path(step)}"
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), digests=ocp.args.JsonRestore()
        )
        try:
            restored: Any = self._manager.restore(step, args=items)
        except (MemoryError, PermissionError):
            raise  # say nothing of the checkpoint
        except Exception as error:  # Orbax raises a dozen kinds, many from its file formats
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise storage.StorageError(
                f"{source} cannot be read, it is damaged or of another model: {reason}"
            ) from error
        storage.verify(restored.state, restored.digests, source)
        return restored.state

    def restore_latest(self, like: TrainState) -> tuple[TrainState | None, list[str]]:
        """The newest state that is whole, and a warning for each newer one that was not.

        A damaged checkpoint is set aside under another name, never deleted.

        Returns:
          None in place of the state if there is no checkpoint.

        Raises:
          StorageError: there are checkpoints and none can be read; all are left as they are.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(like, step)
            except storage.StorageError as error:
                damaged.append((step, error))
                continue
            return state, [
                f"{error}; kept as {self._set_aside(bad).name}, going back to step {step}"
                for bad, error in damaged
            ]
        if damaged:
            raise storage.StorageError(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read; all are "
                f"left as they are: mend them, or take another --workdir. The newest: "
                f"{damaged[0][1]}"
            )
        return None, []

    def close(self):
        self._manager.close()

    def _open(self):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._kept, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _set_aside(self, step):
        aside = self.folder.parent / f"damaged-checkpoint-{step}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder.parent / f"damaged-checkpoint-{step}-{number}"
        self.path(step).rename(aside)
        self._manager.close()
        self._manager = self._open()
        return aside
