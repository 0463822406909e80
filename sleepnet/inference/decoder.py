"""Decoding token after token, in a state that is updated in place.

`sleepnet.wake` leaves the caller's state alive, so each call writes a new one. A decoder owns
its state and donates what a token changes of it, and keeps every layer in buffers of its own:
neither parameters nor caches are copied to be read, and a token moves no more bytes than it must.

An interrupt may fall between a donation and the result's being noted. So a decoder never donates
what its windows began with, notes all of a token at once, and reads lost windows again.
"""

import bisect
import copy
import dataclasses
import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.cycle import cache
from sleepnet.cycle.sleep import sleep
from sleepnet.cycle.wake import check_tokens, copy_if_numpy, of_last_token, wake
from sleepnet.integers import as_integers, to_int32
from sleepnet.types import Array, WakeState, WindowCache

# Several tokens are read in pieces of these sizes, padded: few programs to compile, and of what
# they compute at least a quarter is used.
_PIECES = (8, 32, 128, 512)


class Past(NamedTuple):
    """What wake only reads of a state."""

    fast_weights: Any
    carried: Any
    kept_B: Any


class Written(NamedTuple):
    """What wake writes of a state."""

    blocks: Any
    features_BLD: Any
    length_B: Any


class _Contents(NamedTuple):
    """State, tokens and logits of a decoder, with every layer in separate arrays.

    tokens_BL: NumPy, what the windows hold in their first `length_B` places; None where unknown.
    length_B: NumPy.
    logits_BY: after each row's last token; None where no row's are known.
    """

    past: Past
    window: Written
    tokens_BL: np.ndarray | None
    length_B: np.ndarray
    logits_BY: Array | None


class Decoder:
    """Read one token per row and call, and sleep in between.

    Compiled once for all tokens; nothing that it holds grows. Holds a copy of the parameters to
    wake with, shared by all decoders of the same arrays, and the caller's own to sleep with.

    After an error or an interrupt its rows are as before the call or after it, to float32
    rounding; `length_B` tells which.

    Args:
      params: from `init_params`; must not change while decoders use them.
      state: any number of rows; the caller's stays alive.
      config: static.
      tokens_BL: int, what the windows of `state` hold; needed only where they are not empty, and
        an interrupt is to cost nothing.
      logits_BY: what `state` expects, for `logits_BY` before the first token.

    Raises:
      ValueError: a state of another config, or tokens or logits of another shape.
    """

    def __init__(
        self, params, state: WakeState, *, config: ModelConfig, tokens_BL=None, logits_BY=None
    ):
        self._config, self._params = config, shared(params)
        self._now = self._contents_of(state, tokens_BL, logits_BY)

    @property
    def state(self) -> WakeState:
        """The state as it is now, in the form of `sleepnet.wake`; it stays alive.

        A state that is set here replaces the one before; the caller's stays alive.
        """
        now = self._whole()
        return _stack_state(joined(now.past, now.window))

    @state.setter
    def state(self, state: WakeState):
        self._now = self._contents_of(state)

    @property
    def length_B(self) -> np.ndarray:
        """How many tokens each row has read since its last sleep."""
        return self._now.length_B.copy()

    @property
    def room_B(self) -> np.ndarray:
        """How many tokens each row may still read before it must sleep."""
        return self._config.window - self._now.length_B

    @property
    def tokens_BL(self) -> np.ndarray | None:
        """A copy of what the windows hold, in their first `length_B` places; None if unknown."""
        tokens_BL = self._now.tokens_BL
        return None if tokens_BL is None else tokens_BL.copy()

    @property
    def logits_BY(self) -> Array | None:
        """float32, after the last token that each row has read; None before the first call that
        reads. A row whose logits are not known yet has zeros: the uniform distribution.
        """
        return self._now.logits_BY

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
        now, tokens_B = self._whole(), np.asarray(as_integers("tokens_B", tokens_B))
        if tokens_B.shape != now.length_B.shape:
            raise ValueError(
                f"a call takes one token per row, of shape {now.length_B.shape}; "
                f"got {tokens_B.shape}"
            )
        tokens_BT, one_B = check_tokens(self._config, now.length_B, tokens_B[:, None])
        if now.tokens_BL is not None:
            now.tokens_BL[np.arange(len(one_B)), now.length_B] = tokens_B
        logits_BY, window = step(
            self._params.apart, now.past, now.window, tokens_BT, config=self._config
        )
        self._now = now._replace(window=window, length_B=now.length_B + one_B, logits_BY=logits_BY)
        return logits_BY

    def read(self, tokens_BT, *, length_B=None, logits: str = "last") -> Array:
        """Reads up to `longest_piece` tokens per row, in one of a few programs.

        Args:
          tokens_BT: int token ids, below `config.vocab_size`.
          length_B: how many of the T tokens are valid in each row, a prefix; all by default.
          logits: "last" (B, Y), which is `logits_BY`: a row that reads nothing keeps its own; or
            "all" (B, size, Y), where `size` >= T is that of the program, and the places after a
            row's last valid token hold no prediction.

        Returns:
          float32 logits that predict the token after each.

        Raises:
          ValueError: as `sleepnet.wake`, another `logits`, or too many tokens; the state is as
            before.
        """
        if logits not in ("all", "last"):
            raise ValueError(f"logits must be 'all' or 'last'; got {logits!r}")
        given, self._now = self._reading(self._whole(), tokens_BT, length_B, logits)
        return given

    def rewind(self, length_B, *, opening_BY=None):
        """Forgets all but the first `length_B` tokens of each window, which are read again.

        Args:
          opening_BY: what was expected when the windows were empty, for `logits_BY` of the rows
            whose windows then are. By default a row whose window is empty already keeps its
            logits, and those of the others are no longer known.

        Raises:
          ValueError: lengths that are not those of a part of each window, logits of another shape,
            or windows whose tokens are not known; the state is as before.
        """
        filled_B, length_B = self._now.length_B, np.asarray(as_integers("length_B", length_B))
        fits = length_B.shape == filled_B.shape and (0 <= length_B) & (length_B <= filled_B)
        if not np.all(fits):
            raise ValueError(f"length_B must lie in 0..{filled_B}; got {length_B}")
        self._now = self._reread(to_int32(length_B), self._opening(opening_BY))

    def fork(self) -> "Decoder":
        """Return another decoder of the same rows, with its own state and the same parameters."""
        return self.with_state(self.state, tokens_BL=self._now.tokens_BL, logits_BY=self.logits_BY)

    def with_state(self, state: WakeState, *, tokens_BL=None, logits_BY=None) -> "Decoder":
        """Return a decoder of another state with the same parameters; arguments as in `Decoder`."""
        twin = copy.copy(self)
        twin._now = self._contents_of(state, tokens_BL, logits_BY)
        return twin

    def sleep(self, *, passes: int | None = None, rows_B=None):
        """Run `sleepnet.sleep` on its state."""
        state = sleep(
            self._params.stacked, self.state, config=self._config, passes=passes, rows_B=rows_B
        )
        self._now = self._contents_of(state, self._now.tokens_BL, self.logits_BY)

    def _contents_of(self, state: WakeState, tokens_BL=None, logits_BY=None) -> _Contents:
        cache.check_state(self._config, state)
        length_B = np.array(state.window.length_B)
        windows = (len(length_B), self._config.window)
        if tokens_BL is not None:
            tokens_BL = to_int32(np.asarray(as_integers("tokens_BL", tokens_BL)))
            if tokens_BL.shape != windows:
                raise ValueError(f"tokens_BL must have shape {windows}; got {tokens_BL.shape}")
        elif not length_B.any():
            tokens_BL = np.zeros(windows, np.int32)
        logits_BY = self._as_logits("logits_BY", logits_BY, len(length_B))
        apart = unstack_state(jax.tree.map(copy_if_numpy, state))
        return _Contents(*halves(apart), tokens_BL, length_B, logits_BY)

    def _as_logits(self, name: str, logits_BY, rows: int) -> Array | None:
        if logits_BY is None:
            return None
        shape = (rows, self._config.vocab_size)
        if np.shape(logits_BY) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {np.shape(logits_BY)}")
        return jnp.asarray(copy_if_numpy(logits_BY), jnp.float32)

    def _opening(self, opening_BY) -> Array | None:
        """The logits of rows without tokens: those given, or of the rows that are so now."""
        _, _, _, length_B, logits_BY = self._now
        if opening_BY is not None or logits_BY is None or length_B.all():
            return self._as_logits("opening_BY", opening_BY, len(length_B))
        return jnp.where(length_B[:, None] > 0, 0.0, logits_BY)

    def _whole(self) -> _Contents:
        """Return the contents; read the windows again if an interrupt has deleted them."""
        if self._now.window.features_BLD.is_deleted():
            whole = self._reread(self._now.length_B)
            self._now = whole._replace(logits_BY=self._now.logits_BY)
        return self._now

    def _reread(self, length_B: np.ndarray, opening_BY=None) -> _Contents:
        past, _, tokens_BL, *_ = self._now
        if tokens_BL is None:
            raise ValueError(
                "the windows must be read again, and their tokens are not known: set `state`, or "
                "give tokens_BL with it"
            )
        window = _opened(past, config=self._config)
        contents = _Contents(past, window, tokens_BL, np.zeros_like(length_B), opening_BY)
        size = longest_piece(self._config)
        for start in range(0, length_B.max(), size):
            piece_B = np.clip(length_B - start, 0, size)
            piece_BT = tokens_BL[:, start : start + piece_B.max()]
            _, contents = self._reading(contents, piece_BT, piece_B, "last")
        return contents

    def _reading(
        self, contents: _Contents, tokens_BT, length_B, logits: str
    ) -> tuple[Array, _Contents]:
        tokens_BT, length_B = map(
            np.asarray, check_tokens(self._config, contents.length_B, tokens_BT, length_B)
        )
        longest = longest_piece(self._config)
        if tokens_BT.shape[1] > longest:
            raise ValueError(f"a piece has at most {longest} tokens; got {tokens_BT.shape[1]}")
        if contents.tokens_BL is not None:
            _note(contents.tokens_BL, contents.length_B, tokens_BT, length_B)
        padding = piece_size(self._config, tokens_BT.shape[1]) - tokens_BT.shape[1]
        tokens_BT = np.pad(tokens_BT, ((0, 0), (0, padding)))
        known_BY = contents.logits_BY
        if known_BY is None:
            known_BY = jnp.zeros((len(length_B), self._config.vocab_size), jnp.float32)
        given, logits_BY, window = read(
            self._params.stacked, contents.past, contents.window, tokens_BT, length_B, known_BY,
            config=self._config, logits=logits,
        )  # fmt: skip
        length_B = contents.length_B + length_B
        contents = contents._replace(window=window, length_B=length_B, logits_BY=logits_BY)
        return given, contents


class Params:
    """Parameters as they were given, and every layer in arrays of its own."""

    def __init__(self, params):
        self.stacked, self.apart = params, unstack_params(params)


_ALIVE: weakref.WeakValueDictionary[Any, Params] = weakref.WeakValueDictionary()


def shared(params) -> Params:
    """One for all who wake with the same arrays; keeps them alive, so that no id is used anew."""
    leaves, structure = jax.tree.flatten(params)
    key = (structure, *map(id, leaves))
    one = _ALIVE.get(key)
    if one is None:
        one = _ALIVE[key] = Params(params)
    return one


def _note(tokens_BL: np.ndarray, filled_B: np.ndarray, tokens_BT, length_B):
    """Writes tokens behind those of each row."""
    row, place = np.nonzero(np.arange(tokens_BT.shape[1]) < np.asarray(length_B)[:, None])
    tokens_BL[row, filled_B[row] + place] = tokens_BT[row, place]


def longest_piece(config: ModelConfig) -> int:
    """The most tokens that `Decoder.read` takes."""
    return piece_size(config, config.window)


def piece_size(config: ModelConfig, tokens: int) -> int:
    """The smallest that takes so many tokens, or the largest there is."""
    sizes = [size for size in _PIECES if size < config.window]
    if config.window <= _PIECES[-1]:
        sizes.append(config.window)
    # No generator: what is raised while one is thrown away, Ctrl-C too, Python does not raise.
    return sizes[min(bisect.bisect_left(sizes, tokens), len(sizes) - 1)]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="window")
def step(params, past: Past, window: Written, tokens_BT, *, config) -> tuple[Array, Written]:
    """What a decoder runs: `wake` of one token, of the halves of what `unstack_state` returns."""
    # Written out, a layer of the stack made here is the buffer it was made from, to the compiler.
    written_out = dataclasses.replace(config, unroll=True)
    logits_BY, state = wake(
        stacked(params), stacked(joined(past, window)), tokens_BT, config=written_out, logits="last"
    )
    return logits_BY, halves(apart(state))[1]


@functools.partial(jax.jit, static_argnames=("config", "logits"))
def read(params, past: Past, window: Written, tokens_BT, length_B, known_BY, *, config, logits):
    """`wake` of several tokens.

    Args:
      known_BY: the logits before, which rows of length 0 keep.

    Returns:
      The logits that are asked for, those after each row's last token, and what was written.
    """
    given, state = wake(
        params, stacked(joined(past, window)), tokens_BT,
        config=config, length_B=length_B, logits=logits,
    )  # fmt: skip
    last_BY = of_last_token(given, length_B) if logits == "all" else given
    last_BY = jnp.where(length_B[:, None] > 0, last_BY, known_BY)
    return given if logits == "all" else last_BY, last_BY, halves(apart(state))[1]


@functools.partial(jax.jit, static_argnames="config")
def _opened(past: Past, *, config) -> Written:
    """Windows without tokens."""
    fast_weights, carried, kept_B = stacked(past)
    window = cache.empty_window(config, fast_weights, carried, kept_B)
    return halves(apart(WakeState(fast_weights=fast_weights, window=window)))[1]


def halves(state: WakeState) -> tuple[Past, Written]:
    """What wake only reads of a state, and what it writes."""
    window = state.window
    past = Past(state.fast_weights, window.carried, window.kept_B)
    return past, Written(window.blocks, window.features_BLD, window.length_B)


def joined(past: Past, window: Written) -> WakeState:
    """The state of which these are the halves."""
    kept = {"carried": past.carried, "kept_B": past.kept_B}
    return WakeState(fast_weights=past.fast_weights, window=WindowCache(**kept, **window._asdict()))


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
    """Every list of layers as the array that `apart` took apart."""

    def is_list(x):
        return isinstance(x, list)

    return jax.tree.map(lambda x: jnp.stack(x) if is_list(x) else x, tree, is_leaf=is_list)
