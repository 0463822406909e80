"""Decoding token after token, in a state that is updated in place.

`sleepnet.wake` leaves the caller's state alive, so each call writes a new one. A decoder owns
its state and donates it, and keeps every layer in buffers of its own: neither parameters nor
caches are copied to be read, and a token moves no more bytes than it must.
"""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet import cache
from sleepnet.config import PARTS, ModelConfig
from sleepnet.sleep import sleep
from sleepnet.types import Array, WakeState
from sleepnet.wake import check_tokens, wake


class Decoder:
    """Minds that read one token per row and call, and sleep in between.

    Compiled once for all tokens; nothing that it holds grows. Holds a copy of the parameters to
    wake with, and the caller's own to sleep with.

    Args:
      params: from `init_params`.
      state: one mind per row; the caller's stays alive.
      config: static.
    """

    def __init__(self, params, state: WakeState, *, config: ModelConfig):
        self._config, self._stacked_params = config, params
        self._params = unstack_params(params)
        self.state = state

    @property
    def state(self) -> WakeState:
        """The state as it is now, in the form of `sleepnet.wake`; it stays alive.

        Minds that are set here take the place of those before; the caller's stay alive.
        """
        return _stack_state(self._state)

    @state.setter
    def state(self, state: WakeState):
        cache.check_state(self._config, state)
        length_B = np.array(state.window.length_B)  # waits; whoever interrupts it changes nothing
        self._state, self._length_B = unstack_state(state), length_B

    @property
    def room_B(self) -> np.ndarray:
        """How many tokens each row may still read before it must sleep."""
        return self._config.window - self._length_B

    def wake(self, tokens_B) -> Array:
        """Reads one token per row.

        Args:
          tokens_B: int token ids, below `config.vocab_size`.

        Returns:
          float32 logits_BY that predict the next.

        Raises:
          ValueError: tokens that are not one id of the vocabulary per row, or a row without room;
            the state is as before.
        """
        tokens_B = np.asarray(tokens_B)
        if tokens_B.shape != self._length_B.shape:
            raise ValueError(
                f"a call takes one token per row, of shape {self._length_B.shape}; "
                f"got {tokens_B.shape}"
            )
        tokens_BT, _ = check_tokens(self._config, self._length_B, tokens_B[:, None])
        logits_BY, self._state = step(self._params, self._state, tokens_BT, config=self._config)
        self._length_B = self._length_B + 1
        return logits_BY

    def fork(self) -> "Decoder":
        """Another decoder of the same minds, with a state of its own and the same parameters."""
        twin = copy.copy(self)
        twin.state = self.state
        return twin

    def sleep(self, *, passes: int | None = None, rows_B=None):
        """`sleepnet.sleep` of its state."""
        self.state = sleep(
            self._stacked_params, self.state, config=self._config, passes=passes, rows_B=rows_B
        )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def step(params, state, tokens_BT, *, config):
    """What a decoder runs: `wake` of one token, of what the unstacking functions return."""
    # Written out, a layer of the stack made here is the buffer it was made from, to the compiler.
    written_out = dataclasses.replace(config, unroll=True)
    logits_BY, state = wake(
        stacked(params), stacked(state), tokens_BT, config=written_out, logits="last"
    )
    return logits_BY, apart(state)


@jax.jit
def unstack_params(params):
    """Every layer in arrays of its own."""
    return {
        name: jax.tree.map(list, part) if name in PARTS else part for name, part in params.items()
    }


@jax.jit
def unstack_state(state: WakeState):
    """Every layer in arrays of its own."""
    return apart(state)


@jax.jit
def _stack_state(state) -> WakeState:
    return stacked(state)


def apart(state: WakeState):
    """Every array that is stacked over repeats as the list of its layers."""
    return jax.tree.map(lambda x, axis: list(x) if axis == 1 else x, state, cache.batch_axes(state))


def stacked(tree) -> Any:
    def is_list(x):
        return isinstance(x, list)

    return jax.tree.map(lambda x: jnp.stack(x) if is_list(x) else x, tree, is_leaf=is_list)
