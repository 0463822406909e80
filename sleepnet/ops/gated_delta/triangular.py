"""The inverse of unit lower triangular blocks, with its own derivative."""

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.ops.exact import einsum


@jax.custom_vjp
def unit_lower_inverse(A_ij):
    """(I + A)⁻¹ for strictly lower triangular A (..., C, C), C a power of two.

    Powers of A would be fewer products, but with correlated keys their float32 error reaches
    1e7 times the result.
    """
    return lax.platform_dependent(A_ij, tpu=by_substitution, default=by_doubling)


def by_substitution(A_ij):
    """Row by row, many matrices side by side: what XLA compiles for TPU in seconds.

    Doubling takes it minutes, and pads its small blocks to tiles of 8 x 128.
    """
    identity = jnp.broadcast_to(jnp.eye(A_ij.shape[-1], dtype=A_ij.dtype), A_ij.shape)

    def one_row(i, X):
        row_1j, unit_1k = (lax.dynamic_slice_in_dim(x, i, 1, axis=-2) for x in (A_ij, identity))
        # A is 0 from i on: rows of X that are still those of the identity do not count.
        found = jnp.sum(jnp.swapaxes(row_1j, -1, -2) * X, axis=-2, keepdims=True)
        return lax.dynamic_update_slice_in_dim(X, unit_1k - found, i, axis=-2)

    return lax.fori_loop(0, A_ij.shape[-1], one_row, identity)


def by_doubling(A_ij):
    """From the inverses of the two diagonal blocks comes that of the whole."""
    C = A_ij.shape[-1]
    if C <= 2:
        return jnp.eye(C, dtype=A_ij.dtype) - A_ij
    half = C // 2
    diagonal = jnp.stack([A_ij[..., :half, :half], A_ij[..., half:, half:]])
    upper, lower = by_doubling(diagonal)
    corner = -_product(_product(lower, A_ij[..., half:, :half]), upper)
    top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)


def _product(X_ij, Y_jk):
    """Batched product of square blocks; tiny ones written out, as a call costs more than they."""
    size = X_ij.shape[-1]
    if size > 4:
        return einsum("...ij,...jk->...ik", X_ij, Y_jk)
    return sum(X_ij[..., :, j, None] * Y_jk[..., j, None, :] for j in range(size))


def _inverse_forward(A):
    X = unit_lower_inverse(A)
    return X, X


def _inverse_backward(X, cotangent):
    left = einsum("...ji,...jk->...ik", X, cotangent)
    return (-einsum("...ik,...lk->...il", left, X),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
