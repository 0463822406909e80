"""Sleep: N passes over a window fold it into the fast weights; then the window is dropped.

Algorithm 1 of Lee et al. 2026 (arXiv 2605.26099). The wake pass is the first of the N: it ran
the same blocks from the same fast weights on the same tokens. Each further pass runs the core
over the features and from the fast weights of the pass before; keys, values and gates are
computed from the refined features. After the last pass, the coda reads the final features once,
from the fast weights that it committed at the last sleep.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.cycle import cache
from sleepnet.cycle.wake import check_call, copy_if_numpy, first_pass, is_concrete
from sleepnet.integers import as_integer
from sleepnet.nn import model
from sleepnet.ops.scan import loop
from sleepnet.types import Carried, FastWeights, Span, WakeState


def sleep(
    params, state: WakeState, *, config: ModelConfig, passes: int | None = None, rows_B=None
) -> WakeState:
    """Commit the window of every selected row to its fast weights, and empty it.

    Costs `passes` - 1 passes of the core over the window, and one of the coda if there is
    one; with `passes` = 1 only the eviction. A row without tokens keeps its fast weights.

    Args:
      params: from `init_params`.
      state: rows at any place of their windows; the caller's stays alive.
      config: static.
      passes: N; `config.passes` by default.
      rows_B: bool, the rows that sleep; all by default. Other rows do not change.

    Raises:
      ValueError: `passes` below 1, or `rows_B` of the wrong shape.
    """
    passes, rows_B = check_sleep(config, state, passes, rows_B)
    return _sleep(params, state, rows_B, config=config, passes=passes)


def sleep_from_tokens(
    params,
    state: WakeState,
    tokens_BT,
    *,
    config: ModelConfig,
    length_B=None,
    passes: int | None = None,
) -> WakeState:
    """Read a window of T <= L tokens and sleep on it: all N passes, without a window cache.

    The same as `wake` and then `sleep`, for a context that needs no answer.

    Args:
      state: rows with empty windows.
      tokens_BT, length_B: as for `wake`.
      passes: N; `config.passes` by default.

    Raises:
      ValueError: as `wake`; and, for concrete values, a window that is not empty.
    """
    passes, tokens_BT, length_B = check_ingestion(config, state, tokens_BT, length_B, passes)
    return _sleep_from_tokens(params, state, tokens_BT, length_B, config=config, passes=passes)


@functools.partial(jax.jit, static_argnames=("config", "passes"))
def _sleep(params, state, rows_B, *, config, passes):
    inputs = sleep_inputs(state)
    features = state.window.features_BLD
    fast_weights = refine_window(params, inputs, features, config=config, passes=passes)
    return commit(state, fast_weights, rows_B, config=config)


@functools.partial(jax.jit, static_argnames=("config", "passes"))
def _sleep_from_tokens(params, state, tokens_BT, length_B, *, config, passes):
    return ingest(params, state, tokens_BT, length_B, config=config, passes=passes)


class SleepInputs(NamedTuple):
    """What a sleep takes from a state besides the features of its window; see `refine`."""

    before: FastWeights
    working: FastWeights
    carried: Carried
    length_B: Any
    kept_B: Any


def sleep_inputs(state: WakeState) -> SleepInputs:
    """Return what the sleep of a state begins with."""
    window = state.window
    working = cache.fast_weights_of(window.blocks)
    return SleepInputs(state.fast_weights, working, window.carried, window.length_B, window.kept_B)


def refine_window(
    params, inputs: SleepInputs, features_BTD, *, config, passes, axis=None
) -> FastWeights:
    """Compute the fast weights after passes 2..N over a window.

    Args:
      features_BTD: of the whole window; with an `axis`, of this device's part, perhaps padded.
    """
    before, working, carried, length_B, kept_B = inputs
    span = cache.fresh_span(config, length_B, kept_B, features_BTD.shape[1], axis=axis)
    return refine(
        params, features_BTD, before, working, carried, span, config=config, passes=passes
    )


@functools.partial(jax.jit, static_argnames="config")
def commit(state: WakeState, fast_weights: FastWeights, rows_B, *, config) -> WakeState:
    """Return the state with new fast weights and an empty window in the selected rows."""
    window = state.window
    carried, kept_B = cache.carry_over(
        config, window.carried, window.blocks, window.length_B, window.kept_B
    )
    slept = _empty_state(config, fast_weights, carried, kept_B)
    return slept if rows_B is None else cache.select_states(rows_B, slept, state)


def ingest(params, state: WakeState, tokens_BT, length_B, *, config, passes, axis=None):
    """Return the state after a sleep on tokens; along an `axis`, each device holds some."""
    window = state.window
    _, fast_weights, carried, kept_B = process_window(
        params, state.fast_weights, window.carried, window.kept_B, tokens_BT, length_B,
        config=config, passes=passes, read=False, axis=axis,
    )  # fmt: skip
    return _empty_state(config, fast_weights, carried, kept_B)


def process_window(
    params, before: FastWeights, carried: Carried, kept_B, tokens_BT, length_B, *, config, passes,
    read: bool, axis=None,
):  # fmt: skip
    """Process one window and sleep at its end: the first pass, and `passes` - 1 more.

    Args:
      read: whether y_BTD is: the gradient of what it is read for then runs through all of the
        first pass, and so does that of what the first pass wrote. Else the first pass is one
        like others, detached (with embedding and prelude) if it is not among the last
        `config.gradient_passes`.

    Returns:
      y_BTD of the first pass, for the head; and the fast weights, carried caches and kept_B
      with which the next window starts.
    """
    T = tokens_BT.shape[1]
    length_B = jnp.clip(length_B, 0, T if axis is None else config.window)
    span = cache.fresh_span(config, length_B, kept_B, T, axis=axis)
    past = {part: cache.fresh_past(config, before, carried, part) for part in PARTS}
    detached = not read and config.detached_passes(passes) > 0
    features_BTD, y_BTD, written = first_pass(
        params, tokens_BT, past, span, config=config, detached=detached
    )
    after = refine(
        params, features_BTD, before, cache.fast_weights_of(written), carried, span,
        config=config, passes=passes,
    )  # fmt: skip
    carried, kept_B = cache.carry_over(config, carried, written, length_B, kept_B)
    return y_BTD, after, carried, kept_B


def refine(
    params,
    features_BTD,
    before: FastWeights,
    working: FastWeights,
    carried: Carried,
    span: Span,
    *,
    config: ModelConfig,
    passes: int,
) -> FastWeights:
    """Run passes 2..N over a window whose first pass is done.

    Where `config.gradient_passes` is below N, gradients reach parameters and features in the last
    so many passes (and in the coda behind them) alone. In a pass before, features and the maps
    S_out = M S_in + R of all blocks are constants, and gradients of the fast weights go back
    through M to those before the window, and so to the last passes of earlier windows.

    Args:
      features_BTD: of the first pass, at the core's exit.
      before: the fast weights with which the window began.
      working: those that the first pass left.
      carried: what crossed into the window; every pass starts from it and none writes it.

    Returns:
      The fast weights to commit.
    """
    if passes == 1:
        return working

    def one_pass(refined, _, detached=False):
        return _run(params, "core", refined, carried, span, config, detached), None

    refined = (features_BTD, {"core": working["core"]})
    detached = config.detached_passes(passes)  # the first pass is one of them
    if detached:
        refined = (lax.stop_gradient(features_BTD), refined[1])
    if detached > 1:
        without = functools.partial(one_pass, detached=True)
        refined, _ = loop(without, refined, length=detached - 1, unroll=config.unroll)
    if "pass" in config.remat_levels:
        one_pass = jax.checkpoint(one_pass)
    live = passes - max(detached, 1)
    (x_BTD, core), _ = loop(one_pass, refined, length=live, unroll=config.unroll)
    return working | core | _run(params, "coda", (x_BTD, before), carried, span, config)[1]


def _run(params, part, refined, carried, span, config, detached=False):
    """Run `part` once over the window; return its features and fast weights."""
    x_BTD, fast_weights = refined
    past = cache.fresh_past(config, fast_weights, carried, part)
    x_BTD, written = model.blocks(
        params, x_BTD, past, span, config=config, part=part, detached=detached
    )
    return x_BTD, cache.fast_weights_of({part: written})


@functools.partial(jax.jit, static_argnames="config")
def one_pass(params, inputs: SleepInputs, refined, *, config):
    """Run pass k + 1 over a window, for callers that decide after each pass whether to go on.

    Args:
      refined: features_BLD and the core's fast weights after pass k; after the first pass those of
        the window and of `inputs.working`.

    Returns:
      `refined` behind it; and change_B, how far the pass moved the core's fast weights, relative
      to their norm.
    """
    _, core = after = _run(params, "core", refined, inputs.carried, _span(inputs, config), config)
    return after, _relative_change(refined[1]["core"], core["core"])


@functools.partial(jax.jit, static_argnames="config")
def end_passes(params, state: WakeState, refined, *, config) -> WakeState:
    """Return the state after a sleep whose passes 2..N, at least one, `one_pass` has run."""
    inputs = sleep_inputs(state)
    x_BTD, core = refined
    coda = _run(
        params, "coda", (x_BTD, inputs.before), inputs.carried, _span(inputs, config), config
    )[1]
    return commit(state, inputs.working | core | coda, None, config=config)


def _span(inputs: SleepInputs, config) -> Span:
    return cache.fresh_span(config, inputs.length_B, inputs.kept_B, config.window)


def _relative_change(before, after):
    """Compute |after - before| / |after| per row over (R, B, H, K, V) states; 0 without any."""

    def norm_B(states):
        squares = [jnp.square(s).sum((0, 2, 3, 4)) for s in jax.tree.leaves(states)]
        return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))

    difference = jax.tree.map(jnp.subtract, after, before)
    return norm_B(difference) / jnp.maximum(norm_B(after), jnp.finfo(jnp.float32).tiny)


def _empty_state(config, fast_weights, carried, kept_B):
    window = cache.empty_window(config, fast_weights, carried, kept_B)
    return WakeState(fast_weights=fast_weights, window=window)


def check_sleep(config: ModelConfig, state: WakeState, passes, rows_B):
    """Check and complete the arguments of `sleep`."""
    passes = _check_passes(config, passes)
    cache.check_state(config, state)
    batch = state.window.length_B.shape
    if rows_B is not None:
        rows_B = copy_if_numpy(rows_B)
        if rows_B.shape != batch or rows_B.dtype != bool:
            raise ValueError(
                f"rows_B must be bool of shape {batch}; got {rows_B.dtype} of shape {rows_B.shape}"
            )
    return passes, rows_B


def check_ingestion(config: ModelConfig, state: WakeState, tokens_BT, length_B, passes):
    """Check and complete the arguments of `sleep_from_tokens`."""
    passes = _check_passes(config, passes)
    tokens_BT, length_B = check_call(config, state, tokens_BT, length_B)
    if is_concrete(state.window.length_B):
        for row in np.flatnonzero(np.asarray(state.window.length_B)):
            raise ValueError(
                f"row {row} already holds {state.window.length_B[row]} tokens: "
                f"`wake` the new ones, then `sleep`; or `sleep` first"
            )
    return passes, tokens_BT, length_B


def _check_passes(config, passes):
    return config.passes if passes is None else as_integer("passes", passes, 1)
