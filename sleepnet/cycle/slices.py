"""Nap: a sleep in slices of bounded work, between which its caller may do something else.

`sleep` is one program for the whole window; behind it, other minds wait. A nap runs the same
passes a few tokens at a time, in the way in which `wake` reads a window in pieces: a slice sees
the keys and values that the slices before it wrote in this pass, and goes on from their fast
weights. It takes nothing from its caller, and only `finish_sleep` commits: a nap that is dropped
half-way never was. Meanwhile the rows that are awake may read on.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sleepnet import storage
from sleepnet.config import ModelConfig
from sleepnet.config.model import split_pattern
from sleepnet.cycle import cache
from sleepnet.cycle.sleep import check_sleep, commit
from sleepnet.cycle.wake import is_concrete
from sleepnet.integers import as_integer
from sleepnet.nn import model
from sleepnet.types import DeltaCache, WakeState, WindowCache


@struct.dataclass
class Nap:
    """A sleep in progress.

    window: of the minds that fell asleep, as the passes rewrite it: keys, values, tails and
      working fast weights of the pass in progress, and each token's features of the last pass
      that read it.
    rows_B: the rows that sleep; None for all.
    found_B4: uint32, a hash of what each row held when the nap began; None in a nap of
      `begin_own_sleep`.
    pass_tokens, core_tokens, all_tokens, read_tokens: int32 scalars: of one pass (those of the
      longest row that sleeps), of all that run the core, of the whole sleep, and done. They are
      NumPy's, so that asking for them waits for no device.
    config: static.
    """

    window: WindowCache
    rows_B: Any
    found_B4: Any
    pass_tokens: np.int32
    core_tokens: np.int32
    all_tokens: np.int32
    read_tokens: np.int32
    config: ModelConfig = struct.field(pytree_node=False)

    @property
    def tokens_left(self) -> int:
        """How many tokens of how many passes are still to be read."""
        return int(self.all_tokens - self.read_tokens)

    @property
    def done(self) -> bool:
        """Whether `finish_sleep` may commit."""
        return self.tokens_left == 0


def begin_sleep(
    state: WakeState, *, config: ModelConfig, passes: int | None = None, rows_B=None
) -> Nap:
    """A sleep of which nothing is done yet. In slices,

        nap = begin_sleep(state, config=config)
        while not nap.done:
            nap = continue_sleep(params, nap, tokens=64)
        state = finish_sleep(nap, state)

    is `sleep(params, state, config=config)`, to float32 rounding. Nothing is computed here but a
    hash of each row, by which `finish_sleep` knows it again; the call waits only for the lengths of
    the rows, to read no further than the longest.

    Args:
      state, passes, rows_B: as for `sleep`.

    Raises:
      ValueError: as `sleep`.
    """
    nap = begin_own_sleep(state, config=config, passes=passes, rows_B=rows_B)
    return dataclasses.replace(nap, found_B4=_hash_rows(state))


def begin_own_sleep(
    state: WakeState, *, config: ModelConfig, passes: int | None = None, rows_B=None
) -> Nap:
    """Begin a sleep of a state that nobody else has; arguments and errors as for `begin_sleep`.

    Its caller vouches that `finish_sleep` is given the same rows, which then compares their lengths
    alone and waits for no hash.
    """
    passes, rows_B = check_sleep(config, state, passes, rows_B)
    window, length_B = state.window, state.window.length_B
    pass_tokens = config.window
    if is_concrete(length_B) and is_concrete(rows_B):
        asleep = length_B if rows_B is None else np.where(rows_B, length_B, 0)
        pass_tokens = np.asarray(asleep).max()
    if passes > 1:  # the coda starts anew
        blocks = {**window.blocks, "coda": _awoken(state, "coda")}
        window = dataclasses.replace(window, blocks=blocks)
    with_coda = passes > 1 and split_pattern(config.pattern)["coda"] != ""
    core_tokens = (passes - 1) * pass_tokens
    counts = (pass_tokens, core_tokens, core_tokens + with_coda * pass_tokens, 0)
    return Nap(window, rows_B, None, *map(np.int32, counts), config=config)


def continue_sleep(params, nap: Nap, *, tokens: int) -> Nap:
    """Reads the next `tokens` tokens of the pass in progress, or as many as it has left.

    Costs about `tokens` / L of a pass. Each size is compiled once for all slices of the core, and
    once for the coda; the last slice of a pass is padded.

    Args:
      params: from `init_params`.
      nap: stays alive.
      tokens: static, 1 to `config.window`; it may change from slice to slice.

    Raises:
      ValueError: `tokens` out of its range, or a nap that is done.
    """
    config = nap.config
    tokens = as_integer("tokens", tokens, 1, config.window, note=" (config.window)")
    if nap.done:
        raise ValueError("the nap is done: commit it by `finish_sleep`")
    place = nap.read_tokens % nap.pass_tokens
    part = "core" if nap.read_tokens < nap.core_tokens else "coda"
    rewritten, features_BLD = _slice(
        params, nap.window, place, config=config, part=part, tokens=tokens
    )
    blocks = {**nap.window.blocks, part: rewritten}
    window = dataclasses.replace(nap.window, blocks=blocks, features_BLD=features_BLD)
    read_tokens = nap.read_tokens + np.minimum(np.int32(tokens), nap.pass_tokens - place)
    return dataclasses.replace(nap, window=window, read_tokens=read_tokens)


def finish_sleep(nap: Nap, state: WakeState) -> WakeState:
    """Commits a nap that is done: what `sleep` returns.

    Args:
      state: the minds as they are now. The rows that sleep must be as the nap found them: their
        fast weights and the features of their windows are compared bit for bit, by a hash of 128
        bits. The others may have read on, and stay as they are.

    Raises:
      ValueError: there are tokens left; or, where the values are at hand, a row that sleeps is not
        as the nap found it, because it has read or slept meanwhile or is another state's. Under a
        transformation such as jit nothing can be compared: what the nap made is committed to any
        state.
    """
    cache.check_state(nap.config, state)
    if not nap.done:
        raise ValueError(
            f"the nap has read {nap.read_tokens} of {nap.all_tokens} tokens: `continue_sleep` "
            f"until it is done, or drop it and keep the state"
        )
    _check_asleep(nap, state)
    fast_weights = cache.fast_weights_of(nap.window.blocks)
    return commit(state, fast_weights, nap.rows_B, config=nap.config)


def _check_asleep(nap: Nap, state: WakeState):
    found_B, length_B = nap.window.length_B, state.window.length_B
    if found_B.shape != length_B.shape:
        raise ValueError(
            f"the nap is of {found_B.shape[0]} rows, and the state has {length_B.shape[0]}"
        )
    if not all(map(is_concrete, (found_B, length_B, nap.rows_B, nap.found_B4))):
        return
    asleep_B = True if nap.rows_B is None else np.asarray(nap.rows_B)
    moved_B = np.asarray(found_B) != np.asarray(length_B)
    for row in np.flatnonzero(moved_B & asleep_B):
        raise ValueError(
            f"row {row} sleeps with {found_B[row]} tokens in its window, and the state now has "
            f"{length_B[row]}: wake only the rows that are not in `rows_B`"
        )
    if nap.found_B4 is None:
        return
    changed_B = (np.asarray(nap.found_B4) != np.asarray(_hash_rows(state))).any(axis=1)
    for row in np.flatnonzero(changed_B & asleep_B):
        raise ValueError(
            f"row {row} is not the one that fell asleep: its fast weights or its window of "
            f"{length_B[row]} tokens are others. Give the state that `begin_sleep` was given, in "
            f"which only rows that are not in `rows_B` have read; or begin a new sleep"
        )


@jax.jit
def _hash_rows(state: WakeState):
    """A hash of all that the result of a sleep follows from: fast weights and features."""
    window = state.window
    is_valid_BL = jnp.arange(window.features_BLD.shape[1]) < window.length_B[:, None]
    features_BLD = jnp.where(is_valid_BL[..., None], window.features_BLD, 0)
    fast_weights = jax.tree.leaves(state.fast_weights)
    return storage.hash_rows([features_BLD, *fast_weights], [0] + [1] * len(fast_weights))


def _awoken(state: WakeState, part):
    """The caches of `part` with the fast weights that were committed last."""
    blocks = zip(state.window.blocks[part], state.fast_weights[part], strict=True)
    return tuple(
        dataclasses.replace(block, state=weights) if isinstance(block, DeltaCache) else block
        for block, weights in blocks
    )


@functools.partial(jax.jit, static_argnames=("config", "part", "tokens"))
def _slice(params, window: WindowCache, place, *, config, part, tokens):
    """The caches of `part` and the features behind `tokens` more from `place` on."""
    length_B = jnp.clip(window.length_B - place, 0, tokens)
    window = dataclasses.replace(window, length_B=jnp.minimum(window.length_B, place))
    span = cache.next_span(config, window, length_B, tokens)
    x_BTD = jnp.take_along_axis(
        window.features_BLD, span.position_BT[..., None], axis=1, mode="clip"
    )
    y_BTD, written = model.blocks(
        params, x_BTD, _past(config, window, part, place), span, config=config, part=part
    )
    # The coda is run for its fast weights alone.
    features_BTD = y_BTD if part == "core" else x_BTD
    window = cache.append(config, window, {part: written}, features_BTD, span, read_BTD=y_BTD)
    return window.blocks[part], window.features_BLD


def _past(config, window: WindowCache, part, place):
    """What the blocks go on from; a pass starts with the tails that it found, or none."""
    fast_weights = cache.fast_weights_of({part: window.blocks[part]})
    fresh = cache.fresh_past(config, fast_weights, window.carried, part)
    return tuple(
        dataclasses.replace(past, tail=jnp.where(place == 0, first.tail, past.tail))
        if isinstance(past, DeltaCache) else past
        for first, past in zip(fresh, cache.window_past(window, part), strict=True)
    )  # fmt: skip
