"""Checkpoints that can be trusted: Orbax writes the arrays, a sealed record tells what they were.

The only file that names Orbax. Its functions of version 1 are used (version 0 is called legacy),
not its manager of many steps: which checkpoints count, stay and go is decided here, so that a
save that failed is never listed and never in the way of the next.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import re
import shutil
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from sleepnet import storage, strict_json
from sleepnet.training import multihost
from sleepnet.training.step import TrainState

FOLDER = "checkpoints"
# What a checkpoint consists of: parameters can be read without the rest.
PARAMS, REST, RECORD = "params", "rest", "record"
IN_PARAMS = f".{PARAMS}"  # how their paths begin in a state
RECORD_FILE = "data.json"  # where JsonHandler writes
UNFINISHED, LEAVING = ".orbax-checkpoint-tmp", ".leaving-"
FINE, UNDER_WAY, FAILED = range(3)  # how a save stands on one process


class SaveError(storage.StorageError):
    """A checkpoint could not be written; the message names its step, the folder and the reason."""


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`.

    With several processes all of them call each method, in the same order; the folder is one that
    all of them see.

    Args:
      kept: how many of the newest stay, all by default.
      keep_best: how many of those with the highest metric stay beside them.
    """

    def __init__(self, workdir: pathlib.Path, kept: int | None = None, keep_best: int = 0):
        self.folder = pathlib.Path(workdir).resolve() / FOLDER
        self._kept = kept
        self._keep_best = keep_best
        self._metrics: dict[int, float | None] = {}
        self._saving: concurrent.futures.Future[SaveError | None] | None = None

    @staticmethod
    def exist(workdir: pathlib.Path) -> bool:
        """Whether a folder holds any."""
        folder = pathlib.Path(workdir) / FOLDER
        return folder.is_dir() and any(folder.iterdir())

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def save(self, state: TrainState, *, metric: float | None = None, wait: bool = False):
        """Begins to write a checkpoint; returns when the arrays are copied off their devices.

        Args:
          metric: the higher, the better; for `keep_best`.
          wait: return when it is whole on disk.

        Raises:
          SaveError: this save failed, or an earlier one did; in the latter case this one goes on.
        """
        earlier = self._outcome(wait=True)
        step = int(state.step)
        if not multihost.from_first(lambda: step in self.steps()):
            self._begin(state, step, metric)
        elif metric is not None:
            self.rate(step, metric)
            self._tidy()
        if earlier is not None:
            raise earlier
        if wait:
            self.wait()

    def rate(self, step: int, metric: float):
        """What a checkpoint is worth to `keep_best`, where that was not known when it was saved."""
        self._metrics[step] = metric

    def check(self):
        """Raises SaveError if a save has failed; does not wait for one that goes on.

        With several processes the one whose save failed may be alone to know.
        """
        if (error := self._outcome(wait=False)) is not None:
            raise error

    def wait(self):
        """Returns when nothing is left to write; raises SaveError if a save has failed."""
        if (error := self._outcome(wait=True)) is not None:
            raise error

    def discard_after(self, step: int):
        """Deletes the checkpoints of later steps, newest first.

        Raises:
          StorageError: one cannot be deleted; later ones are gone.
        """
        self.wait()

        def discard():
            for later in [saved for saved in reversed(self.steps()) if saved > step]:
                try:
                    self._delete(later)
                except OSError as error:
                    raise storage.StorageError(
                        f"{self._source(later)} cannot be deleted: {error.strerror}"
                    ) from error

        multihost.from_first(discard)  # nobody goes on before they are gone

    def close(self):
        """`wait`."""
        self.wait()

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of one step, verified.

        Args:
          like: a state of the same structure, or its shapes and dtypes; arrays go where the
            shardings of its leaves say, or to the default device.

        Raises:
          StorageError: a checkpoint that is damaged, or of another model.
        """
        items, digests = self._read(step, {PARAMS: like.params, REST: _rest(like)})
        state = dataclasses.replace(items[REST], params=items[PARAMS])
        storage.verify(state, digests, self._source(step))
        return state

    def restore_params(self, like: Any, step: int) -> Any:
        """The parameters of one step alone, verified; as `restore`."""
        items, digests = self._read(step, {PARAMS: like})
        expected = {
            path.removeprefix(IN_PARAMS): digest
            for path, digest in digests.items()
            if path.startswith(IN_PARAMS)
        }
        storage.verify(items[PARAMS], expected, self._source(step))
        return items[PARAMS]

    def restore_latest(self, like: TrainState) -> tuple[TrainState | None, list[str]]:
        """The newest state that is whole, and a warning for each newer one that was not.

        A damaged checkpoint is set aside under another name, never deleted.

        Returns:
          None in place of the state if there is no checkpoint.

        Raises:
          StorageError: there are checkpoints and none can be read; all are left as they are.
        """
        damaged = []
        for step in reversed(multihost.from_first(self.steps)):
            try:
                state = self.restore(like, step)
            except storage.StorageError as error:
                damaged.append((step, error))
                continue
            kept = multihost.from_first(lambda: [self._set_aside(bad) for bad, _ in damaged])
            return state, [
                f"{error}; kept as {name}, going back to step {step}"
                for (_, error), name in zip(damaged, kept, strict=True)
            ]
        if damaged:
            raise storage.StorageError(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read; all are "
                f"left as they are: mend them, or take another --workdir. The newest: "
                f"{damaged[0][1]}"
            )
        return None, []

    # Writing.

    def _begin(self, state, step, metric):
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        record = {"step": step, "metric": metric, "digests": storage.digests(state)}
        items = {PARAMS: state.params, REST: _rest(state)}
        try:
            multihost.from_first(self._prepare)
        except storage.StorageError as error:
            raise self._save_error(step, error) from error
        self._saving = concurrent.futures.Future()
        try:
            with _context():
                writing = ocp.save_checkpointables_async(
                    str(self.path(step)), {**items, RECORD: storage.seal(record)}
                )
        except Exception as error:  # Orbax raises a dozen kinds
            self._saving.set_result(self._save_error(step, error))
            if multihost.alone():  # with others, all learn of it at the next wait
                self.check()
            return
        self._metrics[step] = metric
        # A thread that does not keep a program from ending: what is half-written is no loss.
        threading.Thread(
            target=self._finish, args=(step, writing, self._saving), daemon=True
        ).start()

    def _prepare(self):
        """Makes the folder and clears it of what saves and deletions cut short have left."""
        storage.prepare_folder(self.folder)
        for pattern in (f"*{UNFINISHED}", f"{LEAVING}*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _finish(self, step, writing, done):
        """Waits, in the background, until a checkpoint is whole; then lets older ones go."""
        try:
            writing.result()
        except Exception as error:
            if jax.process_index() == 0:  # the disk may be full because of it
                shutil.rmtree(f"{self.path(step)}{UNFINISHED}", ignore_errors=True)
            done.set_result(self._save_error(step, error))
            return
        self._tidy()
        done.set_result(None)

    def _outcome(self, wait: bool) -> SaveError | None:
        """How the save in the background ended; None as well while it goes on."""
        if wait and not multihost.alone():
            return self._agreed_outcome()
        if self._saving is None or not (wait or self._saving.done()):
            return None
        error = self._saving.result()
        if multihost.alone():
            self._saving = None
        return error

    def _agreed_outcome(self) -> SaveError | None:
        """The same on all processes: if one failed, the others do not wait for it."""
        while True:
            stands = multihost.gather(self._stands())
            if FAILED in stands:
                elsewhere = multihost.elsewhere(stands.index(FAILED))
                error = self._outcome(wait=False) or SaveError(
                    f"a checkpoint in {self.folder} could not be saved: {elsewhere}. Earlier "
                    f"checkpoints are whole: {self.steps()}"
                )
                self._saving = None
                return error
            if UNDER_WAY not in stands:
                self._saving = None
                return None
            time.sleep(0.02)

    def _stands(self) -> int:
        if self._saving is None:
            return FINE
        if not self._saving.done():
            return UNDER_WAY
        return FAILED if self._saving.result() else FINE

    def _save_error(self, step, error) -> SaveError:
        message = f"checkpoint {self.path(step)} could not be saved: {_reason(error)}"
        with contextlib.suppress(OSError):  # nothing may keep a failure from being told
            message += f". Earlier checkpoints are whole: {self.steps()}"
        return SaveError(message)

    def _tidy(self):
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # what cannot go stays until the next time
                self._let_go()

    def _let_go(self):
        """Deletes checkpoints that are neither among the newest nor among the best."""
        if self._kept is None:
            return
        steps = self.steps()
        stay = set(steps[-self._kept :])
        if self._keep_best:
            rated = [(self._metric(step), step) for step in steps]
            rated = sorted((metric, step) for metric, step in rated if metric is not None)
            stay.update(step for _, step in rated[-self._keep_best :])
        for step in set(steps) - stay:
            self._delete(step)

    def _delete(self, step):
        leaving = self.folder / f"{LEAVING}{step}"
        self.path(step).rename(leaving)  # at once, so that no half of it is ever listed
        shutil.rmtree(leaving, ignore_errors=True)

    def _metric(self, step) -> float | None:
        if step not in self._metrics:
            try:
                self._metrics[step] = self._record(step)["metric"]
            except (OSError, ValueError, storage.StorageError):
                self._metrics[step] = None
        return self._metrics[step]

    # Reading.

    def _record(self, step) -> dict[str, Any]:
        sealed = strict_json.loads((self.path(step) / RECORD / RECORD_FILE).read_text())
        return storage.unseal(sealed, self._source(step))

    def _read(self, step, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Items of a checkpoint, not verified, and the digests of all its arrays.

        Each process reads its own parts: of a damaged file only one may take notice.
        """
        return multihost.together(
            lambda: self._read_here(step, like), f"{self._source(step)} cannot be read"
        )

    def _read_here(self, step, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """`_read` of this process, which waits for no other."""
        mine = jax.process_index()
        try:
            digests = self._record(step)["digests"]
            with _context(primary_host=mine, active_processes={mine}):
                items = ocp.load_checkpointables(str(self.path(step)), jax.tree.map(_shape, like))
        except (MemoryError, PermissionError, storage.StorageError):
            raise  # the first two say nothing of the checkpoint
        except Exception as damage:  # Orbax raises a dozen kinds, many from its file formats
            raise storage.StorageError(
                f"{self._source(step)} cannot be read, it is damaged or of another model: "
                f"{_reason(damage)}"
            ) from damage
        return items, digests

    def _source(self, step) -> str:
        return f"checkpoint {self.path(step)}"

    def _set_aside(self, step) -> str:
        """Renames a damaged checkpoint; its new name."""
        aside = self.folder.parent / f"damaged-checkpoint-{step}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder.parent / f"damaged-checkpoint-{step}-{number}"
        try:
            self.path(step).rename(aside)
        except OSError:  # nothing can be written here: it is as safe where it is
            aside = self.path(step)
        return aside.name


def _context(*, primary_host: int = 0, active_processes=None) -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=RECORD)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.async_options.create_directories_asynchronously = False
    context.multiprocessing_options.primary_host = primary_host
    context.multiprocessing_options.active_processes = active_processes
    return context


def _rest(state: TrainState) -> TrainState:
    return dataclasses.replace(state, params=None)


def _shape(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _reason(error: BaseException) -> str:
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return re.sub(r" \[\w+(\[\d+\])?='.*", "", first)  # a page of TensorStore's options
