"""Blocks as thin Linen shells: they declare parameters and call the ops around them.

Every block is a pure function (params, x_BTD, past, span) -> (x_BTD, written), without
mutable collections. `past` is what the block goes on from, `written` what its tokens add;
it never holds the past, so the caller decides what to keep.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.config import ModelConfig
from sleepnet.ops import gated_delta, norm, rope, short_conv, window_attention
from sleepnet.ops.gated_delta import device_scan, pallas_tpu
from sleepnet.types import AttentionCache, DeltaCache, Span


class _Shell(nn.Module):
    """What all blocks share: how a matrix is declared and used."""

    config: ModelConfig
    detached: bool = False  # gradients go through fast weights alone; see `DeltaBlock`

    def project(self, name: str, x, out: int, *, into_residual: bool = False):
        """x (..., D) -> (..., out) by the matrix `name`."""
        std = math.sqrt(self.config.init_scale / x.shape[-1])
        if into_residual:
            std *= residual_scale(self.config)
        kernel = self.declare(name, nn.initializers.normal(std), (x.shape[-1], out))
        # Of two axes: with three, XLA on CPU takes twice the time for the kernel's gradient.
        flat = x.reshape(-1, x.shape[-1])
        y = jnp.dot(flat, kernel.astype(x.dtype), precision=self.config.matmul_precision)
        return y.reshape(*x.shape[:-1], out)

    def declare(self, name: str, init, shape: tuple[int, ...], dtype=None):
        return self.param(name, init, shape, dtype or self.config.param_dtype)

    def normalise(self, name: str, x, width: int):
        scale = self.declare(name, nn.initializers.ones, (width,))
        return norm.rms_norm(x, scale, eps=self.config.norm_eps)

    def mlp(self, x_BTD):
        config = self.config
        width = round(config.mlp_ratio * config.d_model)
        h = self.normalise("mlp_norm", x_BTD, config.d_model)
        inner = self.project("mlp_in", h, width)
        if config.mlp == "swiglu":
            inner = nn.silu(self.project("mlp_gate", h, width)) * inner
        else:
            inner = nn.gelu(inner)
        return self.project("mlp_out", inner, config.d_model, into_residual=True)


class AttentionBlock(_Shell):
    """Window attention with rotary positions and grouped heads, then the MLP.

    `past` is a tuple of (keys_BGSD, values_BGSD) segments; written are the new tokens' own.
    """

    @nn.compact
    def __call__(self, x_BTD, past: tuple[AttentionCache, ...], span: Span):
        config = self.config
        B, T, _ = x_BTD.shape
        G, D = config.num_kv_heads, config.head_dim
        h = self.normalise("attention_norm", x_BTD, config.d_model)
        q_BTHD = self.project("query", h, config.num_heads * D).reshape(B, T, -1, D)
        k_BTGD = self.project("key", h, G * D).reshape(B, T, G, D)
        v_BTGD = self.project("value", h, G * D).reshape(B, T, G, D)
        q_BTHD, k_BTGD = (
            rope.rotate(x, span.position_BT, base=config.rope_base) for x in (q_BTHD, k_BTGD)
        )
        written = AttentionCache(*(jnp.swapaxes(x, 1, 2) for x in (k_BTGD, v_BTGD)))
        if span.axis is not None:
            written = _gather(written, span.axis)
        segments = [
            (cache.keys, cache.values, mask)
            for cache, mask in zip((*past, written), span.masks, strict=True)
        ]
        out = window_attention.full(q_BTHD, segments, precision=config.matmul_precision)
        out = self.project("out", out.reshape(B, T, -1), config.d_model, into_residual=True)
        x_BTD = x_BTD + out
        return x_BTD + self.mlp(x_BTD), written


class DeltaBlock(_Shell):
    """Short convolution, local rule, gated output norm, then the MLP.

    Log decay g = -exp(A_log) softplus(x W + dt_bias) and write strength
    beta = beta_max sigmoid(x W), as in arXiv 2412.06464; output RMSNorm(o) * SiLU(x W).

    A detached block takes all but the state for constants, x and parameters too: its gradient is
    that of S_out = M S_in + R, and costs one product.
    """

    @nn.compact
    def __call__(self, x_BTD, past: DeltaCache, span: Span):
        config = self.config
        B, T, _ = x_BTD.shape
        H, V = config.num_value_heads, config.value_dim
        h = self.normalise("delta_norm", x_BTD, config.d_model)
        q, k, v, tail = self._queries_keys_values(h, past.tail, span)
        g_BTH, beta_BTH = self._gates(h, span)
        rule = config.rule
        if span.axis is not None:
            out, state = device_scan.over_devices(
                q, k, v, g_BTH, beta_BTH, past.state,
                rule=rule, chunk=config.chunk, axis_name=span.axis,
            )  # fmt: skip
        elif T == 1:
            out, state = gated_delta.step(
                q[:, 0], k[:, 0], v[:, 0], g_BTH[:, 0], beta_BTH[:, 0], past.state, rule=rule
            )
            out = out[:, None]
        else:
            form = pallas_tpu if config.backend == "pallas" else gated_delta
            out, state = form.chunked(
                q, k, v, g_BTH, beta_BTH, past.state,
                rule=rule, chunk=config.chunk, group=config.chunk_group, detached=self.detached,
            )  # fmt: skip
        if self.detached:
            out = lax.stop_gradient(out)
        out = self.normalise("out_norm", out, V).reshape(B, T, H * V)
        out = out * nn.silu(self.project("gate", h, H * V))
        x_BTD = x_BTD + self.project("out", out, config.d_model, into_residual=True)
        return x_BTD + self.mlp(x_BTD), DeltaCache(state, tail)

    def _queries_keys_values(self, h_BTD, tail_BSC, span: Span):
        config = self.config
        B, T, _ = h_BTD.shape
        keys = config.num_key_heads * config.key_dim
        values = config.num_value_heads * config.value_dim
        projected = [("query", keys), ("key", keys), ("value", values)]
        x_BTC = jnp.concatenate([self.project(n, h_BTD, width) for n, width in projected], -1)
        kernel = self.declare("conv", conv_init(config), (config.conv_width, x_BTC.shape[-1]))
        x_BTC, tail = short_conv.full(
            x_BTC, kernel.astype(x_BTC.dtype), tail_BSC, span.length_B, axis_name=span.axis
        )
        q, k, v = jnp.split(nn.silu(x_BTC), [keys, 2 * keys], axis=-1)
        q, k = (
            norm.l2_norm(x.reshape(B, T, -1, config.key_dim), eps=config.norm_eps) for x in (q, k)
        )
        return q, k, v.reshape(B, T, -1, config.value_dim), tail

    def _gates(self, h_BTD, span: Span):
        """Log decay and write strength, float32, both 0 at padding: an exact no-op on S."""
        config = self.config
        H = config.num_value_heads
        A_log = self.declare("A_log", _decay_rate_init(config), (H,), jnp.float32)
        dt_bias = self.declare("dt_bias", _timestep_init(config), (H,), jnp.float32)
        timestep = self.project("timestep", h_BTD, H).astype(jnp.float32)
        g = -jnp.exp(A_log) * jax.nn.softplus(timestep + dt_bias)
        beta = config.beta_max * jax.nn.sigmoid(self.project("beta", h_BTD, H).astype(jnp.float32))
        valid = jnp.arange(h_BTD.shape[1], dtype=jnp.int32) < span.length_B[:, None]
        return (jnp.where(valid[..., None], x, 0.0) for x in (g, beta))


def _gather(here: AttentionCache, axis: str) -> AttentionCache:
    """All devices' keys and values, in one message."""
    both = lax.all_gather(jnp.stack([here.keys, here.values]), axis, axis=3, tiled=True)
    return AttentionCache(*both)


def residual_scale(config: ModelConfig) -> float:
    """Of the matrices that write into the residual stream."""
    return config.init_residual_scale or 1.0 / math.sqrt(2 * config.num_blocks)


def conv_init(config: ModelConfig):
    """Initialiser of the (width, channels) convolution kernels."""

    def near_identity(key, shape, dtype):
        noise = 0.02 * jax.random.normal(key, shape, jnp.float32)
        return noise.at[-1].add(1.0).astype(dtype)

    def uniform(key, shape, dtype):
        bound = 1.0 / math.sqrt(shape[0])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)

    return near_identity if config.conv_init == "identity" else uniform


def _decay_rate_init(config: ModelConfig):
    low, high = config.init_decay_rate

    def init(key, shape, dtype):
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def _timestep_init(config: ModelConfig):
    low, high = config.init_timestep

    def init(key, shape, dtype):
        timestep = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        return timestep + jnp.log(-jnp.expm1(-timestep))  # the inverse of softplus

    return init


BLOCKS = {"A": AttentionBlock, "G": DeltaBlock}
