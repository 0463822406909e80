"""The local rules that write and read fast weights: gated delta and its three relatives.

A fast weight S is a (K, V) matrix per value head, always float32. With q and k
already L2-normalised by the caller,

    gated_delta     S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ
    delta           the same with a_t = 1
    gated_hebbian   S_t = a_t S_{t-1} + b_t k_t v_tᵀ
    hebbian         the same with a_t = 1
    o_t = S_tᵀ q_t / sqrt(K),     a_t = exp(g_t)

(Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464, eq. 10; the gated
Hebbian form is the one that Lee et al. 2026, arXiv 2605.26099, print.) A token with
beta = 0 and g = 0 leaves S exactly as it is: padding is masked that way.

`recurrent` is the definition, token by token; `chunked` the same in matrix products;
`step` a single token; `summarize` the affine map S_out = M S_in + R of a whole span.

Shapes: q and k (B, T, Hk, K); v (B, T, H, V); g and beta (B, T, H); state (B, H, K, V).
The key heads Hk divide the value heads H, and each serves H / Hk of them in turn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.ops.exact import einsum
from sleepnet.ops.gated_delta import chunks
from sleepnet.ops.gated_delta.chunk_scan import Inputs, chunk_scan, detached_scan


def recurrent(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV=None, *, rule="gated_delta"):
    """The definition, one token after another: the oracle of the other forms.

    Args:
      q_BTHK, k_BTHK, v_BTHV: queries, keys and values, any float dtype.
      g_BTH: log decay, <= 0; ignored by the rules without a gate.
      beta_BTH: write strength.
      state_BHKV: fast weights before the first token; zeros by default.
      rule: one of `sleepnet.config.model.RULES`.

    Returns:
      out_BTHV in the dtype of v, and the float32 state_BHKV after the last token.
    """

    def one_token(state, token):
        q, k, v, g, beta = token
        state = jnp.exp(g)[..., None, None] * state
        if chunks.corrects(rule):
            v = v - einsum("bhk,bhkv->bhv", k, state)
        state = state + k[..., :, None] * (beta[..., None] * v)[..., None, :]
        return state, einsum("bhk,bhkv->bhv", q, state)

    q, k, v, g, beta = chunks.prepare(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    state = chunks.initial(k, v, state_BHKV)
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta))
    state, out = lax.scan(one_token, state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v_BTHV.dtype), state


def step(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV=None, *, rule="gated_delta"):
    """`recurrent` for one token, without the axis T. S is read once, by key and query together."""
    q, k, v, g, beta = chunks.prepare(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, rule)
    state = chunks.initial(k, v, state_BHKV)
    decay = jnp.exp(g)[..., None]
    found = decay[..., None] * einsum("bhik,bhkv->bhiv", jnp.stack([k, q], axis=-2), state)
    change = beta[..., None] * (v - found[..., 0, :] if chunks.corrects(rule) else v)
    out = found[..., 1, :] + jnp.sum(q * k, axis=-1, keepdims=True) * change
    state = decay[..., None] * state + k[..., :, None] * change[..., None, :]
    return out.astype(v_BHV.dtype), state


def chunked(
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV=None, *, rule="gated_delta",
    chunk=None, group=None, detached=False,
):  # fmt: skip
    """`recurrent` in matrix products; see `chunk_scan` for the mathematics.

    Differentiable in reverse mode only. The backward pass keeps the inputs, the state before each
    chunk and an inverse (C, C) per chunk, and computes the rest again: memory linear in T.

    Args:
      chunk: tokens C per chunk, a power of two; by default `chunks.chunk_size(T)`.
      group: chunks prepared at once; by default `chunks.group_size`.
      detached: gradients go from the state after to the state before and nowhere else, through
        S_out = M S_in + R with M and R held constant; the backward pass keeps M alone.
    """
    chunks.check_inputs(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    state = chunks.initial(k_BTHK, v_BTHV, state_BHKV)
    (B, T, H, V), Hk = v_BTHV.shape, k_BTHK.shape[2]
    if not rule.startswith("gated"):
        g_BTH = jnp.zeros_like(g_BTH)
    chunk = chunks.chunk_for(T, chunk)
    group = chunks.group_for(B * H, -(-T // chunk), group)
    inputs = Inputs(q_BTHK, k_BTHK, v_BTHV, jnp.maximum(g_BTH, chunks.NO_TRACE), beta_BTH)
    inputs = jax.tree.map(lambda x: chunks.pad(x, chunk * group), inputs)
    state_BhKgV = jnp.swapaxes(state.reshape(B, Hk, H // Hk, -1, V), 2, 3)
    scan = detached_scan if detached else chunk_scan
    scanned: Any = scan(inputs, state_BhKgV, chunks.corrects(rule), chunk, group)
    out_BTHV, state_BhKgV = scanned
    return out_BTHV[:, :T], jnp.swapaxes(state_BhKgV, 2, 3).reshape(B, H, -1, V)


def summarize(k_BTHK, v_BTHV, g_BTH, beta_BTH, *, rule="gated_delta", chunk=None):
    """The affine map of a span of tokens: S_out = M S_in + R for every S_in.

    Returns:
      M_BHKK and R_BHKV, float32. Spans compose: (M2, R2) after (M1, R1) is
      (M2 M1, M2 R1 + R2); see `compose`.
    """
    _, k, v, g, beta = chunks.prepare(k_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    size = chunks.chunk_for(v.shape[1], chunk)
    identity = jnp.broadcast_to(
        jnp.eye(k.shape[-1], dtype=jnp.float32), chunks.initial(k, k, None).shape
    )
    k, v, g, beta = (chunks.to_chunks(x, size) for x in (k, v, g, beta))
    total = chunks.running_sum(g)
    solved = chunks.solved(k, beta, chunks.decay(total), rule)
    from_start = jnp.exp(sum(total))[..., None]
    k_end = k * jnp.exp(chunks.to_end(total))[..., None]
    whole = from_start[..., -1:, :]
    v, removed = beta[..., None] * v, beta[..., None] * from_start * k
    M, R = whole * identity, einsum("nbhck,nbhcv->nbhkv", k_end, v)
    if chunks.corrects(rule):
        M = M - einsum("nbhck,nbhci,nbhil->nbhkl", k_end, solved, removed)
        R = einsum("nbhck,nbhci,nbhiv->nbhkv", k_end, solved, v)
    start = (identity, jnp.zeros_like(R[0]))
    return lax.scan(lambda so_far, chunk: (compose(so_far, chunk), None), start, (M, R))[0]


def compose(first, second):
    """The affine map of `first` followed by `second`: (M2 M1, M2 R1 + R2)."""
    (M1, R1), (M2, R2) = first, second
    return einsum("bhij,bhjk->bhik", M2, M1), einsum("bhij,bhjv->bhiv", M2, R1) + R2
