"""Short causal convolution, one filter per channel.

The last `width - 1` inputs of a row, its tail, are all it needs of the past. Rows may
hold fewer valid tokens than T; the tail is then taken behind the last valid one, so that
padding never enters it.
"""

import jax.numpy as jnp


def full(x_BTC, kernel_WC, tail_BWC, length_B):
    """Convolves T tokens that follow `tail_BWC`.

    Args:
      x_BTC: inputs.
      kernel_WC: one filter of `width` taps per channel; the last tap meets the current token.
      tail_BWC: the `width - 1` inputs before the first token, zeros at the start of a sequence.
      length_B: int32, how many of the T tokens are valid: a prefix.

    Returns:
      y_BTC (undefined at invalid tokens) and the tail behind each row's last valid token.
    """
    width, T = kernel_WC.shape[0], x_BTC.shape[1]
    padded = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    y = sum(padded[:, i : i + T] * kernel_WC[i] for i in range(width))
    last = length_B[:, None] + jnp.arange(width - 1)
    tail = jnp.take_along_axis(padded, last[:, :, None], axis=1)
    return y, tail.astype(tail_BWC.dtype)


def step(x_BC, kernel_WC, tail_BWC):
    """`full` for one valid token, without the axis T."""
    padded = jnp.concatenate([tail_BWC.astype(x_BC.dtype), x_BC[:, None]], axis=1)
    return jnp.sum(padded * kernel_WC, axis=1), padded[:, 1:].astype(tail_BWC.dtype)
