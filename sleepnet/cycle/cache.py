"""The window cache: how it starts, grows with each wake, and is emptied by sleep."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.integers import as_integer
from sleepnet.nn.model import check_arrays, conv_channels, empty_past
from sleepnet.ops import rope
from sleepnet.types import (
    AttentionCache,
    BlockCaches,
    Carried,
    DeltaCache,
    FastWeights,
    Span,
    WakeState,
    WindowCache,
)


def init_state(config: ModelConfig, batch_size: int) -> WakeState:
    """Return `batch_size` fresh rows: zero fast weights and an empty window."""
    batch_size = as_integer("batch_size", batch_size, 1)
    fast_weights = empty_fast_weights(config, batch_size)
    zeros_B = jnp.zeros((batch_size,), jnp.int32)
    return WakeState(
        fast_weights=fast_weights,
        window=empty_window(config, fast_weights, empty_carried(config, batch_size), zeros_B),
    )


def check_state(config: ModelConfig, state: WakeState):
    """Raises ValueError for a state that was made for another config."""
    expected = _abstract_state(config, state.window.length_B.shape[0])
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(
            f"the state was made for another config: its blocks are not those of pattern "
            f"{config.pattern!r} with eviction {config.eviction!r}; make it by init_state(config)"
        )
    check_arrays("the state was made for another config", expected, state)


@functools.lru_cache(maxsize=64)
def _abstract_state(config, batch_size):
    return jax.eval_shape(lambda: init_state(config, batch_size))


def empty_fast_weights(config: ModelConfig, batch_size: int) -> FastWeights:
    """Zeros: S at the start of every sequence."""
    return fast_weights_of({part: empty_past(config, batch_size, part, ()) for part in PARTS})


def empty_carried(config: ModelConfig, batch_size: int) -> Carried:
    """What crosses into the first window: nothing that any token can see."""

    def of_block(past):
        if isinstance(past, DeltaCache):
            return past.tail if config.conv_carry else None
        return past[0] if past else None

    slots = (config.window - 1,) if config.eviction == "sliding" else ()
    return {
        part: tuple(of_block(past) for past in empty_past(config, batch_size, part, slots))
        for part in PARTS
    }


def empty_window(
    config: ModelConfig, fast_weights: FastWeights, carried: Carried, kept_B
) -> WindowCache:
    """A window without tokens, ready to wake from `fast_weights` and `carried`."""
    batch_size = kept_B.shape[0]
    blocks = {}
    for part in PARTS:
        fresh = fresh_past(config, fast_weights, carried, part)
        empty = empty_past(config, batch_size, part, (config.window,))
        blocks[part] = tuple(
            past if isinstance(past, DeltaCache) else zeros[0]
            for past, zeros in zip(fresh, empty, strict=True)
        )
    shape = (batch_size, config.window, config.d_model)
    return WindowCache(
        blocks=blocks,
        carried=carried,
        features_BLD=jnp.zeros(shape, config.compute_dtype),
        length_B=jnp.zeros((batch_size,), jnp.int32),
        kept_B=kept_B,
    )


def fast_weights_of(written: Mapping[str, tuple[Any, ...]]) -> FastWeights:
    """The states among what the blocks wrote."""
    return {
        part: tuple(w.state if isinstance(w, DeltaCache) else None for w in of_part)
        for part, of_part in written.items()
    }


def fresh_past(config: ModelConfig, fast_weights: FastWeights, carried: Carried, part: str):
    """What the blocks of `part` go on from at the first token of a window."""
    pasts = []
    for letter, state, kept in zip(
        config.blocks(part)[0], fast_weights[part], carried[part], strict=True
    ):
        if letter == "A":
            pasts.append(() if kept is None else (kept,))
        else:
            pasts.append(DeltaCache(state, _no_tail(config, state) if kept is None else kept))
    return tuple(pasts)


def window_past(window: WindowCache, part: str):
    """What the blocks of `part` go on from at the next token of a window in progress."""
    return tuple(
        cache if isinstance(cache, DeltaCache) else ((cache,) if kept is None else (kept, cache))
        for cache, kept in zip(window.blocks[part], window.carried[part], strict=True)
    )


def fresh_span(config: ModelConfig, length_B, kept_B, T: int, axis: str | None = None) -> Span:
    """The places of the first T tokens of a window; of this device's T of them with an `axis`."""
    start = 0 if axis is None else T * lax.axis_index(axis)
    everywhere = T if axis is None else T * lax.axis_size(axis)
    position_BT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (length_B.shape[0], T))
    own_BTS = _own_mask(position_BT, length_B, everywhere)
    masks = (*_kept_mask(config, position_BT, kept_B), own_BTS)
    here_B = jnp.clip(length_B - start, 0, T)
    return Span(position_BT=position_BT, length_B=here_B, masks=masks, axis=axis)


def next_span(config: ModelConfig, window: WindowCache, length_B, T: int) -> Span:
    """The places of the next T tokens of a window in progress."""
    position_BT = window.length_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    # No token stands L or more before another of its window: the band cuts only kept keys.
    cached_BL = jnp.arange(config.window, dtype=jnp.int32) < window.length_B[:, None]
    cached_BTL = jnp.broadcast_to(cached_BL[:, None], (*position_BT.shape, config.window))
    kept = _kept_mask(config, position_BT, window.kept_B)
    place_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), position_BT.shape)
    masks = (*kept, cached_BTL, _own_mask(place_BT, length_B, T))
    return Span(position_BT=position_BT, length_B=length_B, masks=masks)


def append(
    config: ModelConfig, window: WindowCache, written, features_BTD, span: Span, *, read_BTD
) -> WindowCache:
    """The window with T more tokens of the parts that `written` names; rows take the valid.

    Args:
      read_BTD: what was computed from the window as it is.
    """
    batch_BT = jnp.arange(features_BTD.shape[0], dtype=jnp.int32)[:, None]
    valid_BT = jnp.arange(features_BTD.shape[1], dtype=jnp.int32) < span.length_B[:, None]
    # A zero that XLA cannot see through makes the writing wait for the last reading: where it
    # does not know their order, it copies the whole window to be safe.
    zero_BT = jnp.minimum(jnp.square(read_BTD[..., 0]), 0).astype(jnp.int32)
    slot_BT = jnp.where(valid_BT, span.position_BT, config.window) + zero_BT  # the end: dropped

    def put_one(cached_BGSD, new_BGTD):
        new_BTGD = jnp.swapaxes(new_BGTD, 1, 2)
        return cached_BGSD.at[batch_BT, :, slot_BT].set(new_BTGD, mode="drop")

    def put(cached_RBGSD, new_RBGTD):
        if not config.unroll:
            return jax.vmap(put_one)(cached_RBGSD, new_RBGTD)
        return jnp.stack(list(map(put_one, cached_RBGSD, new_RBGTD)))

    def merge(cached, new):
        return new if isinstance(cached, DeltaCache) else jax.tree.map(put, cached, new)

    def merged(part):
        return tuple(map(merge, window.blocks[part], written[part]))

    return dataclasses.replace(
        window,
        blocks={**window.blocks, **{part: merged(part) for part in written}},
        features_BLD=window.features_BLD.at[batch_BT, slot_BT].set(features_BTD, mode="drop"),
        length_B=window.length_B + span.length_B,
    )


def carry_over(config: ModelConfig, carried: Carried, blocks: BlockCaches, length_B, kept_B):
    """What crosses a boundary besides S, out of a window of `length_B` tokens.

    Sliding eviction keeps the last L - 1 keys and values, in slots whose places in the next
    window are -(L - 1)..-1; they are turned back by as many places as they move.

    Returns:
      carried, kept_B of the next window.
    """

    def of_block(kept, cache):
        if isinstance(cache, DeltaCache):
            return cache.tail if config.conv_carry else None
        return None if kept is None else _slide(config, kept, cache, length_B)

    new = {part: tuple(map(of_block, carried[part], blocks[part])) for part in PARTS}
    if config.eviction == "hard":
        return new, kept_B
    return new, jnp.minimum(kept_B + length_B, config.window - 1)


def select_rows(rows_B, new, old):
    """`new` where rows_B, else `old`, for trees over parts, whose leaves are (R, B, ...)."""
    return jax.tree.map(
        lambda n, o: jnp.where(rows_B.reshape(1, -1, *[1] * (n.ndim - 2)), n, o), new, old
    )


def select_states(rows_B, new: WakeState, old: WakeState) -> WakeState:
    """Row by row one of two states."""

    def leading(n, o):
        return jnp.where(rows_B.reshape(-1, *[1] * (n.ndim - 1)), n, o)

    windows = (new.window, old.window)
    return WakeState(
        fast_weights=select_rows(rows_B, new.fast_weights, old.fast_weights),
        window=WindowCache(
            blocks=select_rows(rows_B, *(w.blocks for w in windows)),
            carried=select_rows(rows_B, *(w.carried for w in windows)),
            features_BLD=leading(*(w.features_BLD for w in windows)),
            length_B=leading(*(w.length_B for w in windows)),
            kept_B=leading(*(w.kept_B for w in windows)),
        ),
    )


def batch_axes(state: WakeState) -> WakeState:
    """For every leaf of a state the place of its batch axis: behind the repeats where stacked."""

    def stacked(tree):
        return jax.tree.map(lambda _: 1, tree)

    window, leading = state.window, cast(Any, 0)
    return WakeState(
        fast_weights=stacked(state.fast_weights),
        window=WindowCache(
            blocks=stacked(window.blocks), carried=stacked(window.carried),
            features_BLD=leading, length_B=leading, kept_B=leading,
        ),
    )  # fmt: skip


def _slide(config, kept: AttentionCache, cache: AttentionCache, length_B) -> AttentionCache:
    source_BS = length_B[:, None] + jnp.arange(config.window - 1, dtype=jnp.int32)

    def last(kept, cached):
        joined = jnp.concatenate([kept, cached], axis=3)
        return jnp.take_along_axis(joined, source_BS[None, :, None, :, None], axis=3)

    keys, values = last(kept.keys, cache.keys), last(kept.values, cache.values)
    back_BS = jnp.broadcast_to(-length_B[:, None], source_BS.shape)
    by_slot = jnp.swapaxes(keys, 2, 3)
    turned = rope.rotate(by_slot, back_BS, base=config.rope_base)
    return AttentionCache(jnp.swapaxes(turned, 2, 3), values)


def _kept_mask(config, position_BT, kept_B):
    if config.eviction == "hard":
        return ()
    place_S = jnp.arange(1 - config.window, 0, dtype=jnp.int32)
    within = position_BT[..., None] - place_S < config.window
    return (within & (place_S >= -kept_B[:, None, None]),)


def _own_mask(place_BT, length_B, S):
    """Which of the S tokens of a call the queries at `place_BT` see: valid ones up to their own."""
    key_S = jnp.arange(S, dtype=jnp.int32)
    return (key_S <= place_BT[..., None]) & (key_S < length_B[:, None, None])


def _no_tail(config, state_RBHKV):
    shape = (*state_RBHKV.shape[:2], config.conv_width - 1, conv_channels(config))
    return jnp.zeros(shape, config.compute_dtype)
