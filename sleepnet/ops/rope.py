"""Rotary positions (Su et al. 2021, arXiv 2104.09864), halves of the head rotated together."""

import jax.numpy as jnp


def rotate(x_BTHD, position_BT, *, base):
    """Turns each pair (x_i, x_{i + D/2}) by position * base^(-2i/D); in the dtype of x.

    Rotations add up: turning by p and then by -n is turning by p - n. That is how keys
    that outlive a window get their new, smaller positions.
    """
    half = x_BTHD.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHD.dtype)
