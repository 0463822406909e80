"""Normalisations, in float32 whatever the dtype of the input."""

import jax.numpy as jnp
from jax import lax


def rms_norm(x, scale=None, *, eps):
    """x / sqrt(mean(x²) + eps) over the last axis, times `scale`; in the dtype of x."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y if scale is None else y * scale).astype(x.dtype)


def l2_norm(x, *, eps):
    """x / sqrt(sum(x²) + eps) over the last axis, float32.

    eps stands inside the root: the gradient at an all-zero row is finite.
    """
    x32 = x.astype(jnp.float32)
    return x32 * lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)
