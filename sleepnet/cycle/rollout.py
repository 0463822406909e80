"""Rollout: many windows in one differentiable call, for training and scoring.

Every window is woken once, where its loss is read; every window but the last then sleeps.
It shares `process_window` with sleep, and agrees with streaming `wake` and `sleep`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sleepnet.config import ModelConfig
from sleepnet.cycle import cache
from sleepnet.cycle.sleep import process_window
from sleepnet.cycle.wake import check_vocabulary, is_concrete
from sleepnet.integers import as_integers, as_tuple, to_int32
from sleepnet.nn import model
from sleepnet.ops.scan import loop
from sleepnet.types import Array, FastWeights


@struct.dataclass
class Rollout:
    """Results at the scored positions, and the fast weights at the end.

    nll_BWL: float32, -log p(target) in nats; 0 where nothing is scored.
    prediction_BWL: int32, the likeliest token; -1 where nothing is scored.
    fast_weights: after the last window.
    """

    nll_BWL: Array
    prediction_BWL: Array
    fast_weights: FastWeights


def rollout(
    params,
    tokens_BWL,
    length_BW=None,
    targets_BWL=None,
    mask_BWL=None,
    *,
    config: ModelConfig,
    window_passes: tuple[int, ...] | None = None,
    scored_per_window: tuple[int, ...] | None = None,
    reset_BW=None,
) -> Rollout:
    """Run W windows from fresh states, with a sleep after each, and score the targets.

    Args:
      params: from `init_params`; differentiate with respect to them outside.
      tokens_BWL: int token ids, a prefix of each window valid.
      length_BW: int32, valid tokens of each window; all by default.
      targets_BWL: int, the token to predict *at* each scored position: never shifted here. Other
        positions may hold any number.
      mask_BWL: bool, the scored positions, all among the valid; none by default.
      config: static. Gradients run through the last `gradient_passes` passes of a window, as
        `sleep.refine` says; and through a wake pass that bears loss, with what it writes.
      window_passes: static, passes of each window; by default N everywhere, 1 for the last.
        The paper's rule is 1 for every window that bears loss.
      scored_per_window: static, at most so many positions of each window are scored; logits
        are computed for no more. All of a window by default.
      reset_BW: bool, rows that begin a new document at this window: all that their earlier
        windows left is dropped first.

    Raises:
      ValueError: shapes, dtypes or static tuples that do not fit; and, for concrete values (outside
        jit), lengths, token ids or targets out of range, and scored positions that hold no token or
        are more than `scored_per_window`. Under jit values are not checked; a target outside the
        vocabulary then scores NaN.
    """
    plan, arrays = _checked(
        config, tokens_BWL, length_BW, targets_BWL, mask_BWL, reset_BW,
        window_passes, scored_per_window,
    )  # fmt: skip
    B = arrays[0].shape[0]
    carry: tuple[Any, ...] = (
        cache.empty_fast_weights(config, B),
        cache.empty_carried(config, B),
        jnp.zeros((B,), jnp.int32),
    )
    by_window = [jnp.moveaxis(jnp.asarray(x), 1, 0) for x in arrays]
    scores, start = [], 0
    for (passes, scored), group in itertools.groupby(plan):
        stop = start + len(list(group))
        windows = [x[start:stop] for x in by_window]
        carry, score = _live(params, carry, windows, config, passes, scored)
        scores.append(score)
        start = stop
    nll_WBL, prediction_WBL = (jnp.concatenate(x) for x in zip(*scores, strict=True))
    return Rollout(
        nll_BWL=jnp.moveaxis(nll_WBL, 0, 1),
        prediction_BWL=jnp.moveaxis(prediction_WBL, 0, 1),
        fast_weights=carry[0],
    )


def _live(params, carry, windows, config, passes, scored):
    """Consecutive windows with equal passes and equally many scored positions, in one scan."""

    def one_window(carry, window):
        tokens_BL, length_B, targets_BL, mask_BL, reset_B = window
        fast_weights, carried, kept_B = _reset(carry, reset_B)
        y_BLD, *carry = process_window(
            params, fast_weights, carried, kept_B, tokens_BL, length_B,
            config=config, passes=passes, read=scored > 0,
        )  # fmt: skip
        return tuple(carry), _score(params, y_BLD, targets_BL, mask_BL, config, scored)

    if "window" in config.remat_levels:
        one_window = jax.checkpoint(one_window)
    return loop(one_window, carry, windows, length=len(windows[0]), unroll=config.unroll)


def _reset(carry, reset_B):
    fast_weights, carried, kept_B = carry
    fresh = jax.tree.map(jnp.zeros_like, (fast_weights, carried))
    fast_weights, carried = cache.select_rows(reset_B, fresh, (fast_weights, carried))
    return fast_weights, carried, jnp.where(reset_B, 0, kept_B)


def _score(params, y_BLD, targets_BL, mask_BL, config, scored):
    """-log p(target) and the likeliest token at up to `scored` masked positions per row."""
    nll_BL = jnp.zeros(targets_BL.shape, jnp.float32)
    prediction_BL = jnp.full(targets_BL.shape, -1, jnp.int32)
    if scored == 0:
        return nll_BL, prediction_BL
    place_BS = jnp.argsort(~mask_BL, axis=1, stable=True)[:, :scored]
    y_BSD = jnp.take_along_axis(y_BLD, place_BS[..., None], axis=1)
    logits_BSY = model.logits(params, y_BSD, config=config)
    target_BS, mask_BS = (jnp.take_along_axis(x, place_BS, 1) for x in (targets_BL, mask_BL))
    nll_BS = model.nll(logits_BSY, jnp.where(mask_BS, target_BS, 0))
    row_BS = jnp.arange(len(place_BS))[:, None]
    nll_BL = nll_BL.at[row_BS, place_BS].set(jnp.where(mask_BS, nll_BS, 0.0))
    likeliest_BS = jnp.argmax(logits_BSY, axis=-1).astype(jnp.int32)
    prediction_BL = prediction_BL.at[row_BS, place_BS].set(jnp.where(mask_BS, likeliest_BS, -1))
    return nll_BL, prediction_BL


def _checked(
    config, tokens_BWL, length_BW, targets_BWL, mask_BWL, reset_BW, window_passes, scored_per_window
):
    """Check and complete the arguments of `rollout`; return its plan and arrays."""
    tokens_BWL = as_integers("tokens_BWL", tokens_BWL)
    length_BW = None if length_BW is None else as_integers("length_BW", length_BW)
    targets_BWL = None if targets_BWL is None else as_integers("targets_BWL", targets_BWL)
    mask_BWL, reset_BW = (
        x if x is None or hasattr(x, "dtype") else np.asarray(x) for x in (mask_BWL, reset_BW)
    )
    B, W, L = _check_shapes(tokens_BWL, length_BW, targets_BWL, mask_BWL, reset_BW, config)
    if window_passes is None:
        window_passes = (config.passes,) * (W - 1) + (1,)
    if targets_BWL is None or mask_BWL is None:
        targets_BWL, mask_BWL = jnp.zeros_like(tokens_BWL), jnp.zeros(tokens_BWL.shape, bool)
        scored_per_window = (0,) * W
    if scored_per_window is None:
        scored_per_window = (L,) * W
    plan = _plan(window_passes, scored_per_window, W, L)
    if length_BW is None:
        length_BW = np.full((B, W), L)
    _check_values(config, tokens_BWL, length_BW, targets_BWL, mask_BWL, scored_per_window)
    tokens_BWL, length_BW, targets_BWL = map(to_int32, (tokens_BWL, length_BW, targets_BWL))
    if reset_BW is None:
        reset_BW = jnp.zeros((B, W), bool)
    return plan, (tokens_BWL, length_BW, targets_BWL, mask_BWL, reset_BW)


def _check_shapes(tokens_BWL, length_BW, targets_BWL, mask_BWL, reset_BW, config):
    shape = np.shape(tokens_BWL)
    if len(shape) != 3 or 0 in shape or shape[2] > config.window:
        raise ValueError(f"tokens must have shape (B, W, 1..{config.window}); got {shape}")
    if (targets_BWL is None) != (mask_BWL is None):
        raise ValueError("targets_BWL and mask_BWL are given together, or neither")
    for name, x in (("mask_BWL", mask_BWL), ("reset_BW", reset_BW)):
        if x is not None and x.dtype != bool:
            raise ValueError(f"{name} must be bool; got {x.dtype}")
    B, W, L = shape
    for name, x, shape in (
        ("length_BW", length_BW, (B, W)),
        ("targets_BWL", targets_BWL, (B, W, L)),
        ("mask_BWL", mask_BWL, (B, W, L)),
        ("reset_BW", reset_BW, (B, W)),
    ):
        if x is not None and np.shape(x) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {np.shape(x)}")
    return B, W, L


def _plan(window_passes, scored_per_window, W, L) -> list[tuple[int, int]]:
    """Passes and scored positions of each window."""
    window_passes = as_tuple("window_passes", window_passes, W, 1)
    scored_per_window = as_tuple("scored_per_window", scored_per_window, W, 0, L)
    return list(zip(window_passes, scored_per_window, strict=True))


def _check_values(config, tokens_BWL, length_BW, targets_BWL, mask_BWL, scored_per_window):
    """Check values, if they are concrete: not under a transformation."""
    if not all(map(is_concrete, (tokens_BWL, length_BW, mask_BWL))):
        return
    tokens_BWL, length_BW, mask_BWL = map(np.asarray, (tokens_BWL, length_BW, mask_BWL))
    L = tokens_BWL.shape[2]
    for row, w in np.argwhere((length_BW < 0) | (length_BW > L)):
        raise ValueError(f"length_BW must lie in 0..{L}; got {length_BW[row, w]} in row {row}")
    is_valid_BWL = np.arange(L) < length_BW[..., None]
    check_vocabulary(config, tokens_BWL, is_valid_BWL)
    for row, w, place in np.argwhere(mask_BWL & ~is_valid_BWL):
        raise ValueError(
            f"mask_BWL scores place {place} of window {w} in row {row}, which holds "
            f"{length_BW[row, w]} tokens: only their places can be scored"
        )
    if is_concrete(targets_BWL):
        check_vocabulary(config, np.asarray(targets_BWL), mask_BWL, what="target")
    for row, w in np.argwhere(mask_BWL.sum(-1) > np.asarray(scored_per_window)):
        raise ValueError(
            f"row {row} scores {mask_BWL[row, w].sum()} places of window {w}, and "
            f"scored_per_window allows {scored_per_window[w]}"
        )
