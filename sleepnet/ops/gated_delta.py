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

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.loop import loop

MAX_CHUNK = 64
# Every product here touches a fast weight or the inverse. Left to the platform, a float32
# product is bfloat16 multiplies on TPU and TF32 on Hopper.
_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def recurrent(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV=None, *, rule="gated_delta"):
    """The definition, one token after another: the oracle of the other forms.

    Args:
      q_BTHK, k_BTHK, v_BTHV: queries, keys and values, any float dtype.
      g_BTH: log decay, <= 0; ignored by the rules without a gate.
      beta_BTH: write strength.
      state_BHKV: fast weights before the first token; zeros by default.
      rule: one of `sleepnet.config.RULES`.

    Returns:
      out_BTHV in the dtype of v, and the float32 state_BHKV after the last token.
    """

    def one_token(state, token):
        q, k, v, g, beta = token
        state = jnp.exp(g)[..., None, None] * state
        if _corrects(rule):
            v = v - _einsum("bhk,bhkv->bhv", k, state)
        state = state + k[..., :, None] * (beta[..., None] * v)[..., None, :]
        return state, _einsum("bhk,bhkv->bhv", q, state)

    q, k, v, g, beta = _prepare(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    state = _initial(k, v, state_BHKV)
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta))
    state, out = lax.scan(one_token, state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v_BTHV.dtype), state


def step(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV=None, *, rule="gated_delta"):
    """`recurrent` for one token, without the axis T. S is read once, by key and query together."""
    q, k, v, g, beta = _prepare(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, rule)
    state = _initial(k, v, state_BHKV)
    decay = jnp.exp(g)[..., None]
    found = decay[..., None] * _einsum("bhik,bhkv->bhiv", jnp.stack([k, q], axis=-2), state)
    change = beta[..., None] * (v - found[..., 0, :] if _corrects(rule) else v)
    out = found[..., 1, :] + jnp.sum(q * k, axis=-1, keepdims=True) * change
    state = decay[..., None] * state + k[..., :, None] * change[..., None, :]
    return out.astype(v_BHV.dtype), state


def chunked(
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV=None, *, rule="gated_delta", chunk=None
):
    """`recurrent` in matrix products over chunks of `chunk` tokens (a power of two).

    Within a chunk that starts from S, with G the running sum of g, D_ij = exp(G_i - G_j)
    and X = (I + tril(diag(beta) (K Kᵀ * D), -1))⁻¹, the values that are really written are

        U = X diag(beta) (V - exp(G) K S),    O = exp(G) Q S + tril(Q Kᵀ * D) U,
        S_out = exp(G_C) S + (exp(G_C - G) K)ᵀ U

    (arXiv 2412.06464, section 3.3, in the form that keeps no W.) Without the correction
    term U is diag(beta) V.
    """
    q, k, v, g, beta = _prepare(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    state = _initial(k, v, state_BHKV)
    T = v.shape[1]
    size = chunk or chunk_size(T)
    q, k, v, g, beta = (_to_chunks(x, size) for x in (q, k, v, g, beta))
    total = _running_sum(g)  # G, (N, B, H, C)
    decay = _decay(total)
    attended = _einsum("nbhik,nbhjk->nbhij", q, k) * decay
    solved = _solved(k, beta, decay, rule)
    from_start = jnp.exp(sum(total))[..., None]
    to_end = jnp.exp(_to_end(total))[..., None]
    whole = from_start[..., -1:, :]

    def one_chunk(state, chunk):
        q, k, k_end, v, beta, attended, solved, whole = chunk
        if _corrects(rule):
            v = v - _einsum("bhck,bhkv->bhcv", k, state)
        u = _einsum("bhij,bhjv->bhiv", solved, beta * v) if _corrects(rule) else beta * v
        out = _einsum("bhck,bhkv->bhcv", q, state) + _einsum("bhij,bhjv->bhiv", attended, u)
        return whole * state + _einsum("bhck,bhcv->bhkv", k_end, u), out

    chunks = (q * from_start, k * from_start, k * to_end, v, beta[..., None], attended, solved,
              whole)  # fmt: skip
    state, out = loop(one_chunk, state, chunks, length=len(q), unroll=False)
    return _from_chunks(out, T).astype(v_BTHV.dtype), state


def summarize(k_BTHK, v_BTHV, g_BTH, beta_BTH, *, rule="gated_delta", chunk=None):
    """The affine map of a span of tokens: S_out = M S_in + R for every S_in.

    Returns:
      M_BHKK and R_BHKV, float32. Spans compose: (M2, R2) after (M1, R1) is
      (M2 M1, M2 R1 + R2); see `compose`.
    """
    _, k, v, g, beta = _prepare(k_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    size = chunk or chunk_size(v.shape[1])
    identity = jnp.broadcast_to(jnp.eye(k.shape[-1]), _initial(k, k, None).shape)
    k, v, g, beta = (_to_chunks(x, size) for x in (k, v, g, beta))
    total = _running_sum(g)
    solved = _solved(k, beta, _decay(total), rule)
    from_start = jnp.exp(sum(total))[..., None]
    k_end = k * jnp.exp(_to_end(total))[..., None]
    whole = from_start[..., -1:, :]
    v, removed = beta[..., None] * v, beta[..., None] * from_start * k
    M, R = whole * identity, _einsum("nbhck,nbhcv->nbhkv", k_end, v)
    if _corrects(rule):
        M = M - _einsum("nbhck,nbhci,nbhil->nbhkl", k_end, solved, removed)
        R = _einsum("nbhck,nbhci,nbhiv->nbhkv", k_end, solved, v)
    start = (identity, jnp.zeros_like(R[0]))
    return lax.scan(lambda so_far, chunk: (compose(so_far, chunk), None), start, (M, R))[0]


def compose(first, second):
    """The affine map of `first` followed by `second`: (M2 M1, M2 R1 + R2)."""
    (M1, R1), (M2, R2) = first, second
    return _einsum("bhij,bhjk->bhik", M2, M1), _einsum("bhij,bhjv->bhiv", M2, R1) + R2


def chunk_size(T: int) -> int:
    """Tokens per chunk for a span of T: the whole span up to `MAX_CHUNK`, as a power of two."""
    return min(MAX_CHUNK, 1 << max(T - 1, 0).bit_length())


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
        return _einsum("...ij,...jk->...ik", X_ij, Y_jk)
    return sum(X_ij[..., :, j, None] * Y_jk[..., j, None, :] for j in range(size))


def _inverse_forward(A):
    X = unit_lower_inverse(A)
    return X, X


def _inverse_backward(X, cotangent):
    left = _einsum("...ji,...jk->...ik", X, cotangent)
    return (-_einsum("...ik,...lk->...il", left, X),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _corrects(rule):
    return rule in ("gated_delta", "delta")


def _prepare(q, k, v, g, beta, rule):
    """Float32, key heads repeated over value heads, q scaled, g silenced without a gate."""
    _check_shapes(q, k, v, g, beta)
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    groups = v.shape[-2] // k.shape[-2]
    if groups > 1:
        q, k = jnp.repeat(q, groups, axis=-2), jnp.repeat(k, groups, axis=-2)
    g = g if rule.startswith("gated") else jnp.zeros_like(g)
    return q / math.sqrt(k.shape[-1]), k, v, g, beta


def _check_shapes(q, k, v, g, beta):
    heads_fit = v.shape[-2] % k.shape[-2] == 0
    if not (
        q.shape == k.shape
        and k.shape[:-2] == v.shape[:-2]
        and g.shape == beta.shape == v.shape[:-1]
        and heads_fit
    ):
        raise ValueError(
            "expected q and k (..., Hk, K), v (..., H, V), g and beta (..., H) with Hk dividing H; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}, g {g.shape}, beta {beta.shape}"
        )


def _initial(k, v, state_BHKV):
    shape = (v.shape[0], v.shape[-2], k.shape[-1], v.shape[-1])
    if state_BHKV is None:
        return jnp.zeros(shape, jnp.float32)
    if state_BHKV.shape != shape:
        raise ValueError(f"the state must have shape {shape}; got {state_BHKV.shape}")
    return state_BHKV.astype(jnp.float32)


def _to_chunks(x_BTH, size):
    """(B, T, H, ...) -> (N, B, H, C, ...), padded with zeros, which leave S as it is."""
    B, T, H, *rest = x_BTH.shape
    pad = -T % size
    if pad:
        x_BTH = jnp.pad(x_BTH, [(0, 0), (0, pad)] + [(0, 0)] * (x_BTH.ndim - 2))
    x = x_BTH.reshape(B, -1, size, H, *rest)
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _from_chunks(out_NBHCV, T):
    N, B, H, C, V = out_NBHCV.shape
    return jnp.moveaxis(out_NBHCV, (0, 2), (1, 3)).reshape(B, N * C, H, V)[:, :T]


def _running_sum(g_C):
    """Cumulative sum of g in two parts (coarse, rest), for differences that keep their bits.

    After a strong decay the sum is large, and the difference of two places behind it would lose
    what is small. Sums of the coarse part are exact, in steps of 1/64 down to -128, where exp is 0
    in float32; those of the rest stay small. As products: `jnp.cumsum` is a tree of small
    operations on CPU and GPU.
    """
    g_C = jnp.maximum(g_C, -128.0)
    coarse_C = lax.stop_gradient(jnp.round(64.0 * g_C) / 64.0)
    lower = jnp.tril(jnp.ones((g_C.shape[-1],) * 2, jnp.float32))
    return tuple(_einsum("...j,ij->...i", part, lower) for part in (coarse_C, g_C - coarse_C))


def _to_end(total):
    return sum(part[..., -1:] - part for part in total)


def _decay(total):
    """exp(G_i - G_j) for j <= i, else 0. Masked before exp, whose overflow would be NaN later."""
    coarse, rest = (part[..., :, None] - part[..., None, :] for part in total)
    difference = coarse + rest
    lower = jnp.tril(jnp.ones(difference.shape[-2:], bool))
    return jnp.exp(jnp.where(lower, difference, -1e30))


def _solved(k_C, beta_C, decay_CC, rule):
    """X = (I + tril(diag(beta) (K Kᵀ * D), -1))⁻¹ of every chunk."""
    if not _corrects(rule):  # the scan carries it but never reads it
        return jnp.zeros((*decay_CC.shape[:-2], 0, 0), jnp.float32)
    A = beta_C[..., None] * _einsum("...ik,...jk->...ij", k_C, k_C) * decay_CC
    return unit_lower_inverse(jnp.tril(A, -1))
