"""All processes stop at the same step: each puts a ballot into a compiled program, and reads their
sum among its results."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet.training import agree, sharding

STOP = "stop"  # the sum's name among a program's results


class Votes:
    """Whether a process was asked to stop, told to all with what they compute together anyway."""

    def __init__(self, mesh, should_stop: Callable[[], bool]):
        self._should_stop = should_stop
        self._alone = agree.alone()
        self._no, self._yes = (_ballots(mesh, value) for value in (0, 1))
        self._asked = False

    def ballots(self) -> jax.Array:
        """One for each device, to be summed in the program that runs next."""
        return self._yes if self._asked else self._no

    def asked(self) -> bool:
        """Whether to stop now, as far as this process may decide it: only if it is alone."""
        self._asked = self._asked or self._should_stop()
        return self._asked and self._alone


def with_votes(program: Callable) -> Callable:
    """`program(*args) -> (result, metrics)`, with ballots for another argument, counted in the
    metrics."""

    def run(*arguments):
        *arguments, ballots = arguments
        result, metrics = program(*arguments)
        return result, metrics | {STOP: jnp.sum(ballots)}

    return run


def _ballots(mesh, value: int) -> jax.Array:
    if mesh is None:
        return jnp.full(1, value, jnp.int32)
    rows = sharding.local_rows(mesh, mesh.size)
    return sharding.place_batch(mesh, np.full(len(rows), value, np.int32), mesh.size)
