"""The state of a mind, and the letters that name the axes of its arrays.

Axes, as suffixes of names: B batch, T tokens of this call, L window, W windows, D model
width, H heads (G grouped key/value heads of attention), K key dim, V value dim, C scan chunk
or convolution channels, S slots of a cache, Y vocabulary, N passes, R repeats of a part's
shortest period (blocks are stacked over R), P devices.

Trees over the network are dictionaries from a part ("prelude", "core", "coda") to a tuple
with one entry per block of the part's shortest period, stacked over its repeats.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import struct

Array = jax.Array
# Per G block the persistent state_RBHKV, float32; per A block None.
FastWeights = dict[str, tuple[Any, ...]]


@struct.dataclass
class AttentionCache:
    """Keys (already rotated) and values of one A block, both (B, G, S, D); stacked: (R, ...).

    Heads stand before slots because a decode step reads all slots of one head at a time.
    """

    keys: Array
    values: Array


@struct.dataclass
class DeltaCache:
    """What a G block goes on from; stacked, both have a leading R.

    state: (B, H, K, V), float32, the working fast weights: those of the last sleep, and what
      the tokens of this window have written since.
    tail: (B, conv_width - 1, C), the convolution's last inputs.
    """

    state: Array
    tail: Array


BlockCaches = Mapping[str, tuple[AttentionCache | DeltaCache, ...]]
# What each block goes on from: segments of keys and values for A.
Pasts = Mapping[str, tuple[tuple[AttentionCache, ...] | DeltaCache, ...]]
# Per A block the kept keys and values (sliding eviction), per G block the convolution's tail
# (conv_carry); None where nothing crosses.
Carried = dict[str, tuple[Any, ...]]


@struct.dataclass
class WindowCache:
    """Everything that a sleep empties, and the little that crosses a boundary besides S.

    blocks: written by `wake` in this window.
    carried: what the last window left behind; untouched by `wake`.
    features_BLD: the core's output for each token of this window, where sleep starts.
    length_B: int32, tokens in this window.
    kept_B: int32, valid slots of the carried keys; they fill from the right.
    """

    blocks: BlockCaches
    carried: Carried
    features_BLD: Array
    length_B: Array
    kept_B: Array


@struct.dataclass
class WakeState:
    """One mind per row: `fast_weights` persist, `window` lasts until the next sleep."""

    fast_weights: FastWeights
    window: WindowCache


@struct.dataclass
class Span:
    """Where the T tokens of a call stand, shared by all blocks.

    position_BT: int32 place in the window.
    length_B: int32, how many of the T tokens are valid: a prefix.
    masks: per attention segment a mask_BTS, the call's own tokens last.
    axis: name of the mapped axis over which the tokens of a window are spread, T on each device;
      None where they are all here. `length_B` counts this device's tokens, `masks` cover all.
    """

    position_BT: Array
    length_B: Array
    masks: tuple[Array, ...]
    axis: str | None = struct.field(pytree_node=False, default=None)
