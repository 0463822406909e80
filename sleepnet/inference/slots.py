"""Slots: a fixed number of rows on one device, each read, replaced or copied alone.

Every program has one shape, whichever rows it is for, so that nothing compiles while sessions
come and go, and a row's bits do not depend on the others. The state is updated in place.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from sleepnet.config import ModelConfig
from sleepnet.cycle import cache
from sleepnet.cycle.wake import wake
from sleepnet.inference.decoder import apart, shared, stacked, unstack_state
from sleepnet.inference.sampling import Samplers, sample
from sleepnet.types import Array, WakeState


class Slots:
    """Hold the states of B rows; the caller keeps track of which rows are in use.

    Holds a copy of the parameters to read one token with, shared with all decoders of the same
    arrays, and the caller's own for the rest.

    Args:
      params: from `init_params`.
      config: static.
      count: B.
    """

    def __init__(self, params, *, config: ModelConfig, count: int):
        self._config, self._params = config, shared(params)
        self._written_out = dataclasses.replace(config, unroll=True)  # see decode.step
        self._home = jax.tree.leaves(self._params.apart)[0].sharding
        self.count = count
        self.renew()

    def renew(self):
        """Give every row a fresh state."""
        state = unstack_state(cache.init_state(self._config, self.count))
        self._state = jax.device_put(state, self._home)

    def intact(self) -> bool:
        """Return whether the states exist: a program that fails takes them with it. Blocks."""
        leaves = jax.tree.leaves(self._state)
        if any(x.is_deleted() for x in leaves):
            return False
        try:
            jax.block_until_ready(leaves)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def read_one(self, tokens_B, reads_B, draw_B, samplers: Samplers) -> tuple[Array, Array]:
        """Reads a token in the rows that do, and draws what comes next.

        Args:
          tokens_B: int32.
          reads_B: bool; other rows stay bit for bit.
          draw_B, samplers: as for `sample`.

        Returns:
          tokens_B, int32: -1 where the logits are not numbers; and the float32 logits_BY. Both
          mean nothing in rows that do not read.
        """
        drawn_B, logits_BY, self._state = _read_one(
            self._params.apart, self._state, tokens_B, reads_B, draw_B, samplers,
            config=self._written_out,
        )  # fmt: skip
        return drawn_B, logits_BY

    def read_piece(
        self, rows: Sequence[int], tokens_QT, length_Q, draw_Q, samplers: Samplers
    ) -> tuple[Array, Array]:
        """Reads a piece of a window in each of Q or fewer rows, and draws what comes next.

        Args:
          rows: which, all different.
          tokens_QT, length_Q: as for `wake`; those beyond `rows` are padding.
          draw_Q, samplers: as for `sample`.

        Returns:
          tokens_Q and logits_QY, as `read_one`.
        """
        drawn_Q, logits_QY, self._state = _read_piece(
            self._params.stacked, self._state, self._padded(rows, len(length_Q)), tokens_QT,
            length_Q, draw_Q, samplers, config=self._config,
        )  # fmt: skip
        return drawn_Q, logits_QY

    def take(self, rows: Sequence[int], count: int) -> WakeState:
        """Copy the states of some rows into a batch of `count`, padded with fresh states."""
        return _take(self._state, self._padded(rows, count), config=self._config)

    def put(self, rows: Sequence[int | None], state: WakeState):
        """Replace the states of some rows by the first of a batch, from any device.

        Args:
          rows: None for a state that takes no row.
        """
        count = state.window.length_B.shape[0]
        state = jax.device_put(state, self._home)
        self._state = _put(self._state, self._padded(rows, count), state)

    def _padded(self, rows, count) -> np.ndarray:
        """Rows that do not exist for None, and behind those that do."""
        rows = [self.count if row is None else row for row in rows]
        return np.array([*rows, *[self.count] * (count - len(rows))], np.int32)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _read_one(params, state, tokens_B, reads_B, draw_B, samplers, *, config):
    logits_BY, state = wake(
        stacked(params), stacked(state), tokens_B[:, None], config=config,
        length_B=reads_B.astype(np.int32), logits="last",
    )  # fmt: skip
    return sample(logits_BY, draw_B, samplers), logits_BY, apart(state)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _read_piece(params, state, rows_Q, tokens_QT, length_Q, draw_Q, samplers, *, config):
    some = stacked(jax.tree.map(lambda x: x.at[rows_Q].get(mode="clip"), state))
    logits_QY, some = wake(params, some, tokens_QT, config=config, length_B=length_Q, logits="last")
    return sample(logits_QY, draw_Q, samplers), logits_QY, _replaced(state, rows_Q, apart(some))


@functools.partial(jax.jit, static_argnames="config")
def _take(state, rows_Q, *, config):
    some = stacked(jax.tree.map(lambda x: x.at[rows_Q].get(mode="clip"), state))
    exists_Q = rows_Q < state.window.length_B.shape[0]
    return cache.select_states(exists_Q, some, cache.init_state(config, rows_Q.shape[0]))


@functools.partial(jax.jit, donate_argnames="state")
def _put(state, rows_Q, some: WakeState):
    return _replaced(state, rows_Q, apart(some))


def _replaced(state, rows_Q, some):
    """Layers apart, the batch is the first axis of every array."""
    return jax.tree.map(lambda x, new: x.at[rows_Q].set(new, mode="drop"), state, some)
