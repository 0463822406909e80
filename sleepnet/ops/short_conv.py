"""Short causal convolution, one filter per channel.

The last `width - 1` inputs of a row, its tail, are all it needs of the past. Rows may
hold fewer valid tokens than T; the tail is then taken behind the last valid one, so that
padding never enters it.
"""

import jax.numpy as jnp
from jax import lax


def full(x_BTC, kernel_WC, tail_BWC, length_B, *, axis_name=None):
    """Convolves T tokens that follow `tail_BWC`.

    Args:
      x_BTC: inputs.
      kernel_WC: one filter of `width` taps per channel; the last tap meets the current token.
      tail_BWC: the `width - 1` inputs before the first token, zeros at the start of a sequence.
      length_B: int32, how many of the T tokens are valid: a prefix.
      axis_name: of a mapped axis over which the tokens are spread, T >= width - 1 on each
        device; `tail_BWC` comes before the first device's.

    Returns:
      y_BTC (undefined at invalid tokens) and the tail behind each row's last valid token.
    """
    width, T = kernel_WC.shape[0], x_BTC.shape[1]
    before_BWC = tail_BWC.astype(x_BTC.dtype)
    if axis_name is not None:
        before_BWC = _from_the_left(x_BTC, before_BWC, axis_name)
    padded = jnp.concatenate([before_BWC, x_BTC], axis=1)
    y = sum(padded[:, i : i + T] * kernel_WC[i] for i in range(width))
    last = length_B[:, None] + jnp.arange(width - 1, dtype=jnp.int32)
    tail = jnp.take_along_axis(padded, last[:, :, None], axis=1)
    if axis_name is not None:
        tail = _of_the_last(tail, length_B, axis_name)
    return y, tail.astype(tail_BWC.dtype)


def _from_the_left(x_BTC, tail_BWC, axis_name):
    """The last inputs of the device before this one: the halo."""
    width, devices = tail_BWC.shape[1] + 1, lax.axis_size(axis_name)
    to_the_right = [(i, i + 1) for i in range(devices - 1)]
    halo = lax.ppermute(x_BTC[:, x_BTC.shape[1] - (width - 1) :], axis_name, to_the_right)
    return jnp.where(lax.axis_index(axis_name) == 0, tail_BWC, halo)


def _of_the_last(tail_BWC, length_B, axis_name):
    """Row by row the tail of the last device that holds a valid token, on every device."""
    here = lax.axis_index(axis_name)
    last_B = lax.pmax(jnp.where(length_B > 0, here, 0), axis_name)
    return lax.psum(jnp.where((last_B == here)[:, None, None], tail_BWC, 0), axis_name)


def step(x_BC, kernel_WC, tail_BWC):
    """`full` for one valid token, without the axis T."""
    padded = jnp.concatenate([tail_BWC.astype(x_BC.dtype), x_BC[:, None]], axis=1)
    return jnp.sum(padded * kernel_WC, axis=1), padded[:, 1:].astype(tail_BWC.dtype)
