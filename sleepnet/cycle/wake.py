"""Wake: one causal pass over new tokens. It reads fast weights and writes the window cache."""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.cycle import cache
from sleepnet.integers import as_integers, to_int32
from sleepnet.nn import model
from sleepnet.types import Array, Pasts, Span, WakeState

LOGITS = ("all", "last", "none")


@overload
def wake(
    params, state: WakeState, tokens_BT, *, config: ModelConfig, length_B=None,
    logits: Literal["all", "last"] = "all",
) -> tuple[Array, WakeState]: ...  # fmt: skip


@overload
def wake(
    params, state: WakeState, tokens_BT, *, config: ModelConfig, length_B=None,
    logits: Literal["none"],
) -> tuple[None, WakeState]: ...  # fmt: skip


def wake(
    params,
    state: WakeState,
    tokens_BT,
    *,
    config: ModelConfig,
    length_B=None,
    logits: str = "all",
) -> tuple[Array | None, WakeState]:
    """Read T >= 1 tokens in one compiled pass. The fast weights do not change.

    Any split of a window into calls gives the same result.

    Args:
      params: from `init_params`.
      state: any number of rows; the caller's stays alive.
      tokens_BT: int token ids, below `config.vocab_size`.
      config: static.
      length_B: how many of the T tokens are valid in each row, a prefix; all by default.
      logits: "all" (B, T, Y), "last" (B, Y) at each row's last valid token, or "none".

    Returns:
      float32 logits that predict the token after each (None for "none"), and the new state. A row
      of length 0 has zeros for "last": the uniform distribution, since nothing was read that could
      predict. The places of "all" after a row's last valid token hold no prediction.

    Raises:
      ValueError: shapes that do not fit, T above the window, an unknown `logits`; and, where
        the values are at hand (outside jit), a row that would cross its boundary or a token
        id outside the vocabulary. Under jit such rows lose the tokens past the boundary.
    """
    if logits not in LOGITS:
        raise ValueError(f"logits must be one of {', '.join(LOGITS)}; got {logits!r}")
    tokens_BT, length_B = check_call(config, state, tokens_BT, length_B)
    return _wake(params, state, tokens_BT, length_B, config=config, logits=logits)


@functools.partial(jax.jit, static_argnames=("config", "logits"))
def _wake(params, state, tokens_BT, length_B, *, config, logits):
    window = state.window
    length_B = jnp.clip(length_B, 0, config.window - window.length_B)
    span = cache.next_span(config, window, length_B, tokens_BT.shape[1])
    past = {part: cache.window_past(window, part) for part in PARTS}
    features_BTD, y_BTD, written = first_pass(params, tokens_BT, past, span, config=config)
    window = cache.append(config, window, written, features_BTD, span, read_BTD=y_BTD)
    return _read(params, y_BTD, length_B, config, logits), state.replace(window=window)


def first_pass(
    params, tokens_BT, past: Pasts, span: Span, *, config: ModelConfig, detached: bool = False
):
    """Run embedding, prelude, core and coda once; `detached` as in `model.blocks`.

    Returns:
      features_BTD at the core's exit, where sleep goes on; y_BTD behind the last block, which
      the head reads; and what every block wrote.
    """
    written = {}

    def run(part, x_BTD):
        y_BTD, written[part] = model.blocks(
            params, x_BTD, past[part], span, config=config, part=part, detached=detached
        )
        return y_BTD

    x_BTD = model.embed(params, tokens_BT, span.position_BT, config=config)
    x_BTD = run("core", run("prelude", x_BTD))
    y_BTD = run("coda", x_BTD)
    return x_BTD, y_BTD, written


def check_call(config: ModelConfig, state: WakeState, tokens_BT, length_B=None):
    """Return tokens and lengths as arrays; check them against state, window and vocabulary.

    Shapes are always checked; values only where they are at hand: not under a transformation.

    Raises:
      ValueError: they do not.
    """
    cache.check_state(config, state)
    return check_tokens(config, state.window.length_B, tokens_BT, length_B)


def check_tokens(config: ModelConfig, filled_B, tokens_BT, length_B=None):
    """`check_call` without a look at the state: rows hold `filled_B` tokens."""
    tokens_BT = as_integers("tokens_BT", tokens_BT)
    if tokens_BT.ndim != 2:
        raise ValueError(f"tokens_BT must have shape (B, T); got {tokens_BT.shape}")
    B, T = tokens_BT.shape
    if B != filled_B.shape[0]:
        raise ValueError(f"the state has {filled_B.shape[0]} rows and tokens_BT has {B}")
    if not 1 <= T <= config.window:
        raise ValueError(
            f"a call takes 1 to {config.window} tokens (config.window); got {T}: "
            f"split them and sleep at each boundary"
        )
    length_B = np.full((B,), T) if length_B is None else as_integers("length_B", length_B)
    if length_B.shape != (B,):
        raise ValueError(f"length_B must have shape ({B},); got {length_B.shape}")
    _check_values(config, filled_B, tokens_BT, length_B)
    return to_int32(tokens_BT), to_int32(length_B)


def _check_values(config, filled_B, tokens_BT, length_B):
    if not all(map(is_concrete, (filled_B, tokens_BT, length_B))):
        return
    T = tokens_BT.shape[1]
    filled_B, tokens_BT, length_B = map(np.asarray, (filled_B, tokens_BT, length_B))
    for row in np.flatnonzero((length_B < 0) | (length_B > T)):
        raise ValueError(f"length_B must lie in 0..{T}; got {length_B[row]} in row {row}")
    for row in np.flatnonzero(filled_B + length_B > config.window):
        raise ValueError(
            f"row {row} holds {filled_B[row]} of {config.window} tokens and cannot take "
            f"{length_B[row]} more: feed it {config.window - filled_B[row]}, then sleep"
        )
    check_vocabulary(config, tokens_BT, np.arange(T) < length_B[:, None])


def as_ids(config: ModelConfig, tokens) -> np.ndarray:
    """Return the token ids of one row as int32.

    Raises:
      ValueError: not a list of integers, or an id outside the vocabulary.
    """
    ids = np.asarray(as_integers("tokens", tokens))
    if ids.ndim != 1:
        raise ValueError(f"tokens must be a list of ids; got {ids.dtype} of shape {ids.shape}")
    check_vocabulary(config, ids)
    return to_int32(ids)


def check_vocabulary(
    config: ModelConfig, tokens, valid: bool | np.ndarray = True, *, what: str = "token id"
):
    """Check that valid token ids lie in the vocabulary; ValueError names the first that does not.

    Args:
      tokens, valid: NumPy arrays, of windows of rows, of rows, or of one row alone.
      what: the name of such an id in the message.
    """
    last = config.vocab_size - 1
    for place in np.argwhere(valid & ((tokens < 0) | (tokens > last))):
        token, row = tokens[tuple(place)], f" in row {place[0]}" if tokens.ndim > 1 else ""
        window = f" of window {place[1]}" if tokens.ndim > 2 else ""
        raise ValueError(
            f"{what} {token}{row} at place {place[-1]}{window} is outside the vocabulary: ids lie "
            f"in 0..{last}; the nearest is {min(max(token, 0), last)}"
        )


def copy_if_numpy(x):
    """A JAX array as it is; of all else a copy: a device reads a NumPy array where it lies, after
    the call has returned and the caller may have written to it anew."""
    return x if isinstance(x, jax.Array) else np.array(x)


def is_concrete(x) -> bool:
    """Whether the values of an array can be looked at: not under a transformation."""
    if isinstance(x, Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _read(params, y_BTD, length_B, config, logits):
    if logits == "none":
        return None
    if logits == "all":
        return model.logits(params, y_BTD, config=config)
    y_BD = of_last_token(y_BTD, length_B)
    return jnp.where(length_B[:, None] > 0, model.logits(params, y_BD, config=config), 0.0)


def of_last_token(x_BTD, length_B):
    """Select what stands at each row's last valid token; at the first place where there is none."""
    last_B = jnp.maximum(length_B - 1, 0)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
