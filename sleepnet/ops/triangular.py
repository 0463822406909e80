"""The inverse of unit lower triangular blocks, with its own derivative."""

import jax
import jax.numpy as jnp

from sleepnet.ops.exact import einsum


@jax.custom_vjp
def unit_lower_inverse(A_ij):
    """(I + A)⁻¹ for strictly lower triangular A (..., C, C), C a power of two.

    By block doubling: from the inverses of the two diagonal blocks comes that of the whole.
    Powers of A would be fewer products, but with correlated keys their float32 error reaches
    1e7 times the result.
    """
    C = A_ij.shape[-1]
    if C <= 2:
        return jnp.eye(C, dtype=A_ij.dtype) - A_ij
    half = C // 2
    diagonal = jnp.stack([A_ij[..., :half, :half], A_ij[..., half:, half:]])
    upper, lower = unit_lower_inverse(diagonal)
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
