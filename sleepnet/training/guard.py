"""Which steps are bad: judged inside the compiled step, so that a resumed run judges alike."""

import math

import jax
import jax.numpy as jnp
from flax import struct

from sleepnet.config import TrainingConfig


@struct.dataclass
class Recent:
    """What a step is judged by, as part of the state that checkpoints hold.

    loss_N, grad_norm_N: float32, of the last N good steps; the largest float32 until there were
      as many. (Infinity would be an error under JAX_DEBUG_INFS.)
    bad: int32, bad steps so far; bad_in_a_row: int32, those since the last good one.
    """

    loss_N: jax.Array
    grad_norm_N: jax.Array
    bad: jax.Array
    bad_in_a_row: jax.Array


def no_steps(training: TrainingConfig) -> Recent:
    """Before the first step."""

    def none_N():  # an array each: they are donated
        return jnp.full(training.spike_window, jnp.finfo(jnp.float32).max, jnp.float32)

    return Recent(none_N(), none_N(), jnp.int32(0), jnp.int32(0))


def judge(recent: Recent, loss, grad_norm, spike_factor: float) -> tuple[jax.Array, Recent]:
    """Whether a step is bad, and what the next one is judged by.

    Bad is a loss or a gradient that is not finite, or either of them above `spike_factor` times
    its median over the last good steps (0: never).
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if spike_factor:
        bad |= loss > spike_factor * jnp.median(recent.loss_N)
        bad |= grad_norm > spike_factor * jnp.median(recent.grad_norm_N)

    def remember(last_N, value):
        return jnp.where(bad, last_N, jnp.roll(last_N, -1).at[-1].set(value))

    return bad, Recent(
        loss_N=remember(recent.loss_N, loss),
        grad_norm_N=remember(recent.grad_norm_N, grad_norm),
        bad=recent.bad + bad.astype(jnp.int32),
        bad_in_a_row=jnp.where(bad, recent.bad_in_a_row + 1, 0),
    )


def keep_where(bad, old, new):
    """The tree `old` where the step is bad, else `new`."""
    return jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)


def fault(metrics) -> str:
    """What is bad about a step with these metrics, as numbers."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(metrics[key]):
            return f"{key} is {metrics[key]}"
    return f"loss {metrics['loss']:.3g} or grad_norm {metrics['grad_norm']:.3g} is a spike"
