"""The local rule over tokens that are spread over devices: a parallel scan of affine maps.

Each device holds T consecutive tokens. Over any span the rule is an affine map of the state,
S_out = M S_in + R, and maps compose; so each device folds its own tokens into (M, R), all devices
exchange theirs in one message, whose size does not depend on T, and each runs its tokens from the
state that the maps of the devices before it make. Within a chunk, in the terms of
`chunk_scan` and with U = X β V and W = X β γ K (arXiv 2412.06464, section 3.3),

    S' = γ_C S + (τ K)ᵀ (U - W S),      O = γ Q S + P (U - W S),

so both scans use the same U, W and inverse.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.ops.exact import einsum
from sleepnet.ops.gated_delta import chunks


class _Chunk(NamedTuple):
    """What does not depend on S, (n, B, H, ...), key heads repeated."""

    q: Any  # γ Q
    k: Any  # τ K
    u: Any  # U
    w: Any  # W; None without a correction term
    attended: Any  # P
    whole: Any  # γ_C


def over_devices(
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV, *, axis_name, rule="gated_delta",
    chunk=None,
):  # fmt: skip
    """`gated_delta.chunked` of all devices' tokens one behind the other.

    Call it under `jax.pmap` or `jax.shard_map`.

    Args:
      q_BTHK, ..., beta_BTH: this device's tokens.
      state_BHKV: before the first token of the first device; the same on all.
      axis_name: of the mapped axis; device i holds the tokens behind those of device i - 1.

    Returns:
      out_BTHV of this device's tokens, and the float32 state behind the last token of the last
      device; the same on all.
    """
    inputs = chunks.prepare(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    state = chunks.initial(*inputs[1:3], state_BHKV)
    T = v_BTHV.shape[1]
    ready = _prepare(inputs, chunks.chunk_for(T, chunk), rule)
    before, last = _exchange(_fold(ready), state, axis_name)

    @jax.checkpoint
    def one_chunk(state, now):
        written = _written(now, state)
        out = einsum("bhck,bhkv->bhcv", now.q, state)
        out += einsum("bhij,bhjv->bhiv", now.attended, written)
        return now.whole * state + einsum("bhck,bhcv->bhkv", now.k, written), out

    _, out = lax.scan(one_chunk, before, ready)
    return chunks.from_chunks(out, T).astype(v_BTHV.dtype), last


def _prepare(inputs, chunk, rule) -> _Chunk:
    q, k, v, g, beta = (chunks.to_chunks(x, chunk) for x in inputs)
    total = chunks.running_sum(g)
    decay = chunks.decay(total)
    from_start = jnp.exp(sum(total))[..., None]
    u, w = beta[..., None] * v, None
    if chunks.corrects(rule):
        inverse = chunks.solved(k, beta, decay, rule)
        both = jnp.concatenate([u, beta[..., None] * from_start * k], axis=-1)
        u, w = jnp.split(einsum("...ij,...jx->...ix", inverse, both), [v.shape[-1]], axis=-1)
    return _Chunk(
        q=from_start * q,
        k=jnp.exp(chunks.to_end(total))[..., None] * k,
        u=u,
        w=w,
        attended=einsum("...ik,...jk->...ij", q, k) * decay,
        whole=from_start[..., -1:, :],
    )


def _written(now: _Chunk, state):
    return now.u if now.w is None else now.u - einsum("bhck,bhkx->bhcx", now.w, state)


def _fold(ready: _Chunk):
    """(M | R) of this device's tokens, side by side: (B, H, K, K + V)."""
    K = ready.k.shape[-1]
    no_writes = jnp.zeros((*ready.u.shape[:-1], K), jnp.float32)
    ready = ready._replace(u=jnp.concatenate([no_writes, ready.u], axis=-1))
    start = jnp.zeros((*ready.k.shape[1:3], K, ready.u.shape[-1]), jnp.float32)
    start += jnp.eye(*start.shape[-2:], dtype=jnp.float32)

    @jax.checkpoint
    def one_chunk(maps, now):
        written = _written(now, maps)
        return now.whole * maps + einsum("bhck,bhcx->bhkx", now.k, written), None

    return lax.scan(one_chunk, start, ready)[0]


def _exchange(maps, state, axis_name):
    """From every device's (M | R): the state before this device's tokens, and behind all."""
    here, before = lax.axis_index(axis_name), state
    K = state.shape[-2]
    for device, of_device in enumerate(lax.all_gather(maps, axis_name)):
        before = jnp.where(here == device, state, before)
        M, R = of_device[..., :K], of_device[..., K:]
        state = einsum("bhij,bhjv->bhiv", M, state) + R
    return before, state
