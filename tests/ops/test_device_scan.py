"""The local rule over virtual devices: the same rule, and what it costs each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import GRADIENTS, assert_agree, assert_identical
from reference import local_rule

from sleepnet.config.model import RULES
from sleepnet.evaluation.programs import Program
from sleepnet.ops import gated_delta
from sleepnet.ops.gated_delta import device_scan

B, HK, H, K, V = 2, 1, 2, 6, 4


def draw(seed, T):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, T, HK, K))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.normal(size=(B, T, H, V))
    g = -0.3 * rng.exponential(size=(B, T, H))
    beta = 2 * rng.uniform(0.01, 0.999, size=(B, T, H))
    g[0, -3:], beta[0, -3:] = 0.0, 0.0  # the first row is padded
    state = rng.normal(size=(B, H, K, V))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, beta, state)]


@functools.cache
def over(devices, rule="gated_delta", chunk=None):
    """(tokens split over a first axis, state) -> outputs and states of all devices."""
    form = functools.partial(device_scan.over_devices, axis_name="d", rule=rule, chunk=chunk)
    return jax.pmap(
        lambda tokens, state: form(*tokens, state),
        axis_name="d", in_axes=(0, None), devices=jax.local_devices()[:devices],
    )  # fmt: skip


def split(x, devices):
    return jnp.stack(jnp.split(x, devices, axis=1))


def run(inputs, devices, **kwargs):
    *tokens, state = inputs
    out, states = over(devices, **kwargs)([split(x, devices) for x in tokens], state)
    return jnp.concatenate(list(out), axis=1), states


@pytest.mark.parametrize(
    ("rule", "devices", "T", "chunk"),
    [("gated_delta", 8, 40, 2), ("gated_delta", 3, 21, 4), ("gated_delta", 1, 7, None)]
    + [(rule, 2, 14, 4) for rule in RULES if rule != "gated_delta"],
)
@pytest.mark.optimized
def test_devices_in_a_row_are_one_device(rule, devices, T, chunk):
    """Outputs and state of the float64 recurrence, for spans that no chunk divides; the state is
    the same on every device, bit for bit."""
    inputs = draw(0, T)
    out, states = run(inputs, devices, rule=rule, chunk=chunk)
    rows = [local_rule(*(np.asarray(x[b]) for x in inputs), rule=rule) for b in range(B)]
    expected_out, expected = (np.stack(x) for x in zip(*rows, strict=True))
    assert_agree((out, states[0]), (expected_out, expected))
    for state in states[1:]:
        assert_identical(state, states[0])


def test_gradients_cross_devices():
    """jax.grad outside pmap: by every input, those of the recurrence."""
    inputs = draw(1, 12)

    def functional(form):
        def total(*inputs):
            out, state = form(*inputs)
            weights = jax.random.normal(jax.random.key(1), out.shape)
            state_weights = jax.random.normal(jax.random.key(2), state.shape)
            return jnp.sum(out * weights) + jnp.sum(state * state_weights)

        return jax.grad(total, argnums=range(6))

    def split_form(*inputs):
        out, states = run(inputs, 3, chunk=2)
        return out, states[1]

    actual = functional(split_form)(*inputs)
    expected = jax.jit(functional(gated_delta.recurrent))(*inputs)
    assert_agree(actual, expected, GRADIENTS)


def shapes(T, width, heads=2):
    x = jax.ShapeDtypeStruct((1, T, heads, width), jnp.float32)
    gate = jax.ShapeDtypeStruct((1, T, heads), jnp.float32)
    state = jax.ShapeDtypeStruct((1, heads, width, width), jnp.float32)
    return [x, x, x, gate, gate], state


def program_over(devices, L, width):
    tokens, state = shapes(L // devices, width)
    spread = [jax.ShapeDtypeStruct((devices, *x.shape), x.dtype) for x in tokens]
    return Program(over(devices, chunk=64).lower(spread, state).compile())


@pytest.mark.parametrize(("width", "allowed"), [(128, 2.1), (64, 1.8)])
def test_a_device_of_eight_pays_little_more_than_its_share(width, allowed):
    """FLOPs of the products per device, prefix included, over an eighth of those of the best form
    on one device; 8192 tokens in chunks of 64."""
    L, devices = 8192, 8
    tokens, state = shapes(L, width)
    form = functools.partial(gated_delta.chunked, chunk=64, group=1)
    alone = Program(jax.jit(form).lower(*tokens, state).compile())
    formula = L * 2 * (6 * width**2 + 8 * 64 * width + 2 / 3 * 64**2)
    assert alone.dot_flops == pytest.approx(formula, rel=0.02)
    assert program_over(devices, L, width).dot_flops <= allowed / devices * alone.dot_flops


def test_the_exchange_is_one_message_whose_size_knows_no_length():
    """One all-gather of (M, R) per device, for 512 tokens and for 4096."""
    width, heads, devices = 16, 2, 8
    message = 4 * devices * heads * width * (width + width)
    for L in (512, 4096):
        assert program_over(devices, L, width).collectives == [("all-gather", message)]
