"""Normalisations against their formulas, and what holds at a row of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree

from sleepnet.ops import norm

EPS = 1e-6
X = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)


def test_rms_norm_has_unit_mean_square_times_scale():
    """x / sqrt(mean(x^2) + eps), then the scale."""
    scale = np.arange(1.0, 8.0, dtype=np.float32)
    exact = X.astype(np.float64)
    expected = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + EPS)
    assert_agree(norm.rms_norm(X, eps=EPS), expected)
    assert_agree(norm.rms_norm(X, scale, eps=EPS), expected * scale)


def test_l2_norm_has_unit_length():
    """x / sqrt(sum(x^2) + eps)."""
    exact = X.astype(np.float64)
    expected = exact / np.sqrt(np.sum(exact**2, -1, keepdims=True) + EPS)
    assert_agree(norm.l2_norm(X, eps=EPS), expected)


@pytest.mark.parametrize("normalise", [norm.rms_norm, norm.l2_norm])
def test_gradient_at_a_row_of_zeros_is_finite_and_right(normalise):
    """At x = 0 the derivative is that of x / sqrt(eps), whatever the neighbours are."""
    x = jnp.asarray(X[0]).at[2].set(0.0)
    weights = jnp.asarray(X[1])
    gradient = jax.grad(lambda x: jnp.sum(weights * normalise(x, eps=EPS)))(x)
    assert np.isfinite(gradient).all()
    assert_agree(gradient[2], np.asarray(weights[2], np.float64) / np.sqrt(EPS))


def test_bfloat16_is_normalised_in_float32():
    """rms_norm hands back the dtype it got, rounded once; l2_norm always float32."""
    x = jnp.asarray(300.0 * X, jnp.bfloat16)  # whose squares bfloat16 would round
    exact = np.asarray(x, np.float64)
    rms = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + EPS)
    l2 = exact / np.sqrt(np.sum(exact**2, -1, keepdims=True) + EPS)
    actual_rms, actual_l2 = norm.rms_norm(x, eps=EPS), norm.l2_norm(x, eps=EPS)
    assert (actual_rms.dtype, actual_l2.dtype) == (jnp.bfloat16, jnp.float32)
    assert_agree(actual_l2, l2)
    assert (np.abs(np.asarray(actual_rms, np.float64) - rms) <= 2**-8 * np.abs(rms) + 1e-9).all()
