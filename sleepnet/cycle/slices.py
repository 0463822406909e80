"""Sleep in slices of bounded work, between which the caller may do something else.

`sleep` is one program for the whole window, and nothing else runs until it ends. A sleep in slices
runs the same passes a few tokens at a time, in the way in which `wake` reads a window in pieces: a
slice sees the keys and values that earlier slices of the pass wrote, and goes on from their fast
weights. The caller's state is unchanged until `finish_sleep` commits: a sleep that is dropped
before has no effect. Meanwhile the rows that are awake may read on.
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
class IncrementalSleep:
    """A sleep of which some slices are done.

    window: of the rows that sleep, as the passes rewrite it: keys, values, tails and
      working fast weights of the pass in progress, and each token's features of the last pass
      that read it.
    rows_B: the rows that sleep; None for all.
    found_B4: uint32, a hash of what each row held when the sleep began; None in one of
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
        """Return the number of tokens, over all passes, that are still to be read."""
        return int(self.all_tokens - self.read_tokens)

    @property
    def done(self) -> bool:
        """Return whether `finish_sleep` may commit."""
        return self.tokens_left == 0


def begin_sleep(
    state: WakeState, *, config: ModelConfig, passes: int | None = None, rows_B=None
) -> IncrementalSleep:
    """Begin a sleep of which nothing is done yet. In slices,

        progress = begin_sleep(state, config=config)
        while not progress.done:
            progress = continue_sleep(params, progress, tokens=64)
        state = finish_sleep(progress, state)

    is `sleep(params, state, config=config)`, to float32 rounding. Nothing is computed here but a
    hash of each row, by which `finish_sleep` knows it again; the call waits only for the lengths of
    the rows, to read no further than the longest.

    Args:
      state, passes, rows_B: as for `sleep`.

    Raises:
      ValueError: as `sleep`.
    """
    progress = begin_own_sleep(state, config=config, passes=passes, rows_B=rows_B)
    return dataclasses.replace(progress, found_B4=_hash_rows(state))


def begin_own_sleep(
    state: WakeState, *, config: ModelConfig, passes: int | None = None, rows_B=None
) -> IncrementalSleep:
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
    return IncrementalSleep(window, rows_B, None, *map(np.int32, counts), config=config)


def continue_sleep(params, progress: IncrementalSleep, *, tokens: int) -> IncrementalSleep:
    """Run the next `tokens` tokens of the pass in progress, or as many as it has left.

    Costs about `tokens` / L of a pass. Each size is compiled once for all slices of the core, and
    once for the coda; the last slice of a pass is padded.

    Args:
      params: from `init_params`.
      progress: stays alive.
      tokens: static, 1 to `config.window`; it may change from slice to slice.

    Raises:
      ValueError: `tokens` out of its range, or a sleep that is done.
    """
    config = progress.config
    tokens = as_integer("tokens", tokens, 1, config.window, note=" (config.window)")
    if progress.done:
        raise ValueError("the sleep is done: commit it by `finish_sleep`")
    place = progress.read_tokens % progress.pass_tokens
    part = "core" if progress.read_tokens < progress.core_tokens else "coda"
    rewritten, features_BLD = _slice(
        params, progress.window, place, config=config, part=part, tokens=tokens
    )
    blocks = {**progress.window.blocks, part: rewritten}
    window = dataclasses.replace(progress.window, blocks=blocks, features_BLD=features_BLD)
    read_tokens = progress.read_tokens + np.minimum(np.int32(tokens), progress.pass_tokens - place)
    return dataclasses.replace(progress, window=window, read_tokens=read_tokens)


def finish_sleep(progress: IncrementalSleep, state: WakeState) -> WakeState:
    """Commit a sleep that is done; the result is that of `sleep`.

    Args:
      state: the rows as they are now. Those that sleep must be as `begin_sleep` found them: their
        fast weights and the features of their windows are compared bit for bit, by a hash of 128
        bits. The others may have read on, and stay as they are.

    Raises:
      ValueError: there are tokens left; or, for concrete values, a row that sleeps is not as
        `begin_sleep` found it, because it has read or slept since, or is another state's. Under a
        transformation such as jit nothing can be compared: the new fast weights are committed to
        any state.
    """
    cache.check_state(progress.config, state)
    if not progress.done:
        raise ValueError(
            f"the sleep has read {progress.read_tokens} of {progress.all_tokens} tokens: "
            f"`continue_sleep` until it is done, or drop it and keep the state"
        )
    _check_asleep(progress, state)
    fast_weights = cache.fast_weights_of(progress.window.blocks)
    return commit(state, fast_weights, progress.rows_B, config=progress.config)


def _check_asleep(progress: IncrementalSleep, state: WakeState):
    found_B, length_B = progress.window.length_B, state.window.length_B
    if found_B.shape != length_B.shape:
        raise ValueError(
            f"the sleep is of {found_B.shape[0]} rows, and the state has {length_B.shape[0]}"
        )
    if not all(map(is_concrete, (found_B, length_B, progress.rows_B, progress.found_B4))):
        return
    asleep_B = True if progress.rows_B is None else np.asarray(progress.rows_B)
    moved_B = np.asarray(found_B) != np.asarray(length_B)
    for row in np.flatnonzero(moved_B & asleep_B):
        raise ValueError(
            f"row {row} sleeps with {found_B[row]} tokens in its window, and the state now has "
            f"{length_B[row]}: wake only the rows that are not in `rows_B`"
        )
    if progress.found_B4 is None:
        return
    changed_B = (np.asarray(progress.found_B4) != np.asarray(_hash_rows(state))).any(axis=1)
    for row in np.flatnonzero(changed_B & asleep_B):
        raise ValueError(
            f"row {row} is not the one that fell asleep: its fast weights or its window of "
            f"{length_B[row]} tokens are others. Give the state that `begin_sleep` was given, in "
            f"which only rows that are not in `rows_B` have read; or begin a new sleep"
        )


@jax.jit
def _hash_rows(state: WakeState):
    """Hash all that determines the result of a sleep: fast weights and features."""
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
    """Return the caches of `part` and the features after `tokens` more from `place` on."""
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
