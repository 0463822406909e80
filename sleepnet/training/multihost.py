"""How the processes of a run decide alike, stop together, and learn of each other's errors.

All of them call each function, in the same order, and wait for each other; a process that is alone
does not wait.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sleepnet import strict_json
from sleepnet.config import ConfigError
from sleepnet.storage import StorageError
from sleepnet.training import sharding

T = TypeVar("T")
STOP = "stop"  # the name of the summed flags among a program's results
# How a call ended in a process; the later in this list, the worse.
WELL, EXPLAINED, BROKEN = range(3)


def alone() -> bool:
    """Whether this process has no others."""
    return jax.process_count() == 1


def gather(number: int) -> list[int]:
    """The numbers of all processes, in order."""
    if alone():
        return [number]
    return multihost_utils.process_allgather(np.int32(number)).tolist()


def together(act: Callable[[], T], failed: str = "") -> T:
    """Calls it in each process; where it fails in one, it fails in all.

    Args:
      failed: what then could not be done, for the processes in which it could be.

    Raises:
      what `act` raised here; where it failed elsewhere alone, StorageError. But if some process
      raised neither StorageError nor ConfigError, which tell a person what to do, the others raise
      RuntimeError: nobody takes the end of the run for something to be heeded and gone over.
    """
    if alone():
        return act()
    result, error = None, None
    try:
        result = act()
    except Exception as raised:
        error = raised
    ends = gather(WELL if error is None else EXPLAINED if _is_explained(error) else BROKEN)
    worst = max(ends)
    if worst == WELL:
        return result  # pyright: ignore[reportReturnType]
    if error is not None and ends[jax.process_index()] == worst:
        raise error
    told = elsewhere(ends.index(worst))
    told = f"{failed}: {told}" if failed else told
    raise (StorageError if worst == EXPLAINED else RuntimeError)(told) from error


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes, in all processes; only there it is called.

    Processes may see a shared disk in different states: what follows from its files is decided
    by one of them.

    Args:
      make: returns what JSON can hold; tuples come back as lists.

    Raises:
      as `together`.
    """
    if alone():
        return make()
    first = jax.process_index() == 0
    made = together(lambda: strict_json.dumps(make()).encode() if first else b"")
    return strict_json.loads(_broadcast(made))


def _broadcast(data: bytes) -> bytes:
    """Those of process 0."""
    size = gather(len(data))[0]
    padded = np.zeros(1 << size.bit_length(), np.int32)  # of few sizes: each is compiled
    padded[: len(data)] = np.frombuffer(data, np.uint8)  # nothing, but of process 0
    return bytes(multihost_utils.broadcast_one_to_all(padded)[:size].astype(np.uint8))


def elsewhere(process: int) -> str:
    """What those are told whose fault it is not."""
    return f"process {process} failed; its log tells why"


def _is_explained(error: Exception) -> bool:
    return isinstance(error, StorageError | ConfigError)


class StopFlags:
    """Whether a process was asked to stop, summed in a program that all processes run anyway.

    So all of them stop at the same step, and none waits for the others to ask.
    """

    def __init__(self, mesh, should_stop: Callable[[], bool]):
        self._should_stop = should_stop
        self._alone = alone()
        self._no, self._yes = (_on_devices(mesh, value) for value in (0, 1))
        self._asked = False

    def flags(self) -> jax.Array:
        """Return one flag per device, to be summed in the program that runs next."""
        return self._yes if self._asked else self._no

    def asked(self) -> bool:
        """Return whether to stop now, which a process decides only if it is alone."""
        self._asked = self._asked or self._should_stop()
        return self._asked and self._alone


def with_stop_flags(program: Callable) -> Callable:
    """Let `program(*args) -> (result, metrics)` also take flags, whose sum joins its metrics."""

    def run(*arguments):
        *arguments, flags = arguments
        result, metrics = program(*arguments)
        return result, metrics | {STOP: jnp.sum(flags)}

    return run


def _on_devices(mesh, value: int) -> jax.Array:
    if mesh is None:
        return jnp.full(1, value, jnp.int32)
    rows = sharding.local_rows(mesh, mesh.size)
    return sharding.place_batch(mesh, np.full(len(rows), value, np.int32), mesh.size)
