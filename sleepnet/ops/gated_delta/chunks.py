"""What the chunked forms of the local rule share: tokens in chunks, decays and inverses.

Arrays of chunks are (N, B, H, C, ...): N chunks of C tokens each.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.config.checks import choices
from sleepnet.config.model import RULES, as_chunk
from sleepnet.integers import as_integer
from sleepnet.ops.exact import einsum
from sleepnet.ops.gated_delta.triangular import unit_lower_inverse

# Measured by `launch.benchmark --suite=rule`: tokens of a chunk at most, and heads (over rows and
# chunks) that are prepared at once. On CPU what is prepared should stay in the cache.
CHUNK_TOKENS = {"cpu": 32}
GROUP_HEADS = {"cpu": 8}
OTHER_CHUNK_TOKENS, OTHER_GROUP_HEADS = 64, 2048
# exp of a log decay below it is 0 in float32.
NO_TRACE = -128.0


def chunk_for(T: int, chunk: int | None) -> int:
    """Return the tokens per chunk that were asked for, or by default `chunk_size(T)`."""
    return chunk_size(T) if chunk is None else as_chunk(chunk)


def group_for(heads: int, length: int, group: int | None) -> int:
    """Return the chunks per group that were asked for, or by default `group_size`."""
    return group_size(heads, length) if group is None else as_integer("group", group, 1)


def chunk_size(T: int, platform: str | None = None) -> int:
    """Tokens per chunk for a span of T, a power of two; on this platform, if on no other."""
    most = CHUNK_TOKENS.get(platform or jax.default_backend(), OTHER_CHUNK_TOKENS)
    return min(most, 1 << max(T - 1, 0).bit_length())


def group_size(heads: int, length: int, platform: str | None = None) -> int:
    """How many of `length` chunks, of `heads` heads over all rows, are prepared at once."""
    prepared = GROUP_HEADS.get(platform or jax.default_backend(), OTHER_GROUP_HEADS)
    most = max(1, min(length, prepared // heads))
    return -(-length // -(-length // most))  # as many groups, evenly filled


def corrects(rule):
    """Whether the rule writes only what S does not yet tell of a key."""
    return rule in ("gated_delta", "delta")


def prepare(q, k, v, g, beta, rule):
    """Float32, key heads repeated over value heads, q scaled, g silenced without a gate."""
    check_inputs(q, k, v, g, beta, rule)
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    groups = v.shape[-2] // k.shape[-2]
    if groups > 1:
        q, k = jnp.repeat(q, groups, axis=-2), jnp.repeat(k, groups, axis=-2)
    g = g if rule.startswith("gated") else jnp.zeros_like(g)
    return q / math.sqrt(k.shape[-1]), k, v, g, beta


def check_inputs(q, k, v, g, beta, rule):
    """ValueError for shapes that do not fit together, no token, or an unknown rule."""
    if rule not in RULES:
        raise ValueError(choices("rule", rule, RULES))
    heads_fit = v.shape[-2] % k.shape[-2] == 0
    if not (
        q.shape == k.shape
        and k.shape[:-2] == v.shape[:-2]
        and g.shape == beta.shape == v.shape[:-1]
        and heads_fit
        and 0 not in v.shape
    ):
        raise ValueError(
            "expected q and k (..., Hk, K), v (..., H, V), g and beta (..., H) with Hk dividing H, "
            f"and at least one token; got q {q.shape}, "
            f"k {k.shape}, v {v.shape}, g {g.shape}, beta {beta.shape}"
        )


def initial(k, v, state_BHKV):
    """S to start from in float32: zeros by default; ValueError if its shape does not fit."""
    shape = (v.shape[0], v.shape[-2], k.shape[-1], v.shape[-1])
    if state_BHKV is None:
        return jnp.zeros(shape, jnp.float32)
    if state_BHKV.shape != shape:
        raise ValueError(f"the state must have shape {shape}; got {state_BHKV.shape}")
    return state_BHKV.astype(jnp.float32)


def pad(x_BT, size):
    """With zeros, which leave S as it is, up to a multiple of `size` tokens."""
    missing = -x_BT.shape[1] % size
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths) if missing else x_BT


def to_chunks(x_BTH, size):
    """(B, T, H, ...) -> (N, B, H, C, ...), padded."""
    B, _, H, *rest = x_BTH.shape
    x = pad(x_BTH, size).reshape(B, -1, size, H, *rest)
    return jnp.moveaxis(x, (1, 3), (0, 2))


def from_chunks(out_NBHCV, T):
    """Chunks laid out again as out_BTHV, without padding."""
    N, B, H, C, V = out_NBHCV.shape
    return jnp.moveaxis(out_NBHCV, (0, 2), (1, 3)).reshape(B, N * C, H, V)[:, :T]


def running_sum(g_C):
    """Cumulative sum of g in two parts (coarse, rest), for differences that keep their bits.

    After a strong decay the sum is large, and the difference of two places behind it would lose
    what is small. Sums of the coarse part are exact, in steps of 1/64 down to `NO_TRACE`; those of
    the rest stay small. As products: `jnp.cumsum` is a tree of small operations on CPU and GPU.
    """
    g_C = jnp.maximum(g_C, NO_TRACE)
    coarse_C = lax.stop_gradient(jnp.round(64.0 * g_C) / 64.0)
    lower = jnp.tril(jnp.ones((g_C.shape[-1],) * 2, jnp.float32))
    return tuple(einsum("...j,ij->...i", part, lower) for part in (coarse_C, g_C - coarse_C))


def to_end(total):
    """The log decay from each place to the end of its chunk, of a `running_sum`."""
    return sum(part[..., -1:] - part for part in total)


def decay(total):
    """exp(G_i - G_j) for j <= i, else 0. Masked before exp, whose overflow would be NaN later."""
    coarse, rest = (part[..., :, None] - part[..., None, :] for part in total)
    difference = coarse + rest
    # The mask in full shape: the TPU kernel cannot broadcast one.
    row, column = (
        lax.broadcasted_iota(jnp.int32, difference.shape, difference.ndim - axis) for axis in (2, 1)
    )
    return jnp.exp(jnp.where(column <= row, difference, -1e30))


def solved(k_C, beta_C, decay_CC, rule):
    """X = (I + tril(diag(beta) (K Kᵀ * D), -1))⁻¹ of every chunk."""
    if not corrects(rule):  # the scan carries it but never reads it
        return jnp.zeros((*decay_CC.shape[:-2], 0, 0), jnp.float32)
    A = beta_C[..., None] * einsum("...ik,...jk->...ij", k_C, k_C) * decay_CC
    return unit_lower_inverse(jnp.tril(A, -1))
