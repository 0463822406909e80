"""The chunked local rule with its own backward pass: what `gated_delta.chunked` runs.

Within a chunk of C tokens that starts from S, with G the running sum of g, γ = exp(G),
τ = exp(G_C - G), D_ij = exp(G_i - G_j) for j <= i, P = tril(Q Kᵀ * D) and
X = (I + tril(diag(β) (K Kᵀ * D), -1))⁻¹ (arXiv 2412.06464, section 3.3, without its W),

    R = β (V - γ K S)     U = X R     O = γ Q S + P U     S' = γ_C S + Kᵀ (τ U)

and, backwards from dO and dS',

    dU = Pᵀ dO + τ K dS'     dR = Xᵀ dU     dS = γ_C dS' + Qᵀ (γ dO) - Kᵀ (β γ dR).

The inverse needs no derivative of its own: with A = X⁻¹ - I, dA = -tril(dR Uᵀ, -1).

Chunks are taken in groups: what does not depend on S is computed for a group at once, and only
the products with S run one chunk after another. Kept for the backward pass are the inputs, the
state before each chunk and the inverses; all else is computed again.

Axes here: n chunks of a group, b rows, h key heads, c (i, j) tokens of a chunk, g value heads of
each key head, k and v. Key heads are never repeated: with g behind c, a product with keys takes
all their value heads at once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.ops.exact import einsum
from sleepnet.ops.gated_delta import chunks
from sleepnet.ops.gated_delta.triangular import unit_lower_inverse
from sleepnet.ops.scan import loop

# Written out, a few chunks are faster than a loop of them; many would be slow to compile.
MAX_WRITTEN_OUT = 4


class Inputs(NamedTuple):
    """Of T tokens, whole groups: q, k (B, T, h, K); v (B, T, H, V); gates (B, T, H), H = hg."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    beta: Any


class _Group(NamedTuple):
    """What a group of chunks knows before it meets S."""

    q: Any  # nbhck, divided by sqrt(K)
    k: Any  # nbhck
    v: Any  # nbhcgv
    beta: Any  # nbhcg1
    decay: Any  # D, nbhgij
    attended: Any  # P, nbhgij
    from_start: Any  # γ, nbhcg1
    to_end: Any  # τ, nbhcg1

    @property
    def whole(self):
        return self.from_start[..., -1:, :, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def chunk_scan(inputs: Inputs, state, corrects: bool, chunk: int, group: int):
    """Runs all tokens from state_bhkgv, `group` chunks of `chunk` tokens at a time.

    Returns:
      out (B, T, H, V) in the dtype of v, and the float32 state behind the last token.
    """
    return _forward(inputs, state, corrects, chunk, group)[0]


def _forward(inputs, state, corrects, chunk, group):
    state, out, before, inverse = _scan(_one_chunk, state, inputs, corrects, chunk, group)
    return (out, state), (inputs, before, state, inverse)


def _scan(one_chunk, carry, inputs, corrects, chunk, group):
    """All tokens: the last carry, out, what `one_chunk` kept of every chunk, and the inverses."""

    def one_group(carry, index):
        taken = _take(inputs, index, group * chunk)
        ready = _prepare(taken, chunk)
        inverse = _inverse(ready) if corrects else None
        carry, (out, kept) = _over_chunks(one_chunk, carry, (ready, inverse))
        return carry, (_tokens(out, taken.v), kept, inverse)

    groups = inputs.q.shape[1] // (group * chunk)
    carry, (out, kept, inverse) = loop(
        one_group, carry, jnp.arange(groups), length=groups, unroll=False
    )
    return carry, _join(out), kept, inverse


def _one_chunk(state, now):
    ready, inverse = now
    _, written = _write(ready, inverse, state)
    out = ready.from_start * _read(ready.q, state) + _mix(ready.attended, written)
    after = ready.whole * state + _fold(ready.k, ready.to_end * written)
    return after, (out, state)


def _backward(corrects, chunk, group, kept, cotangents):
    inputs, before, last, inverse = kept
    d_out, d_last = cotangents

    def one_group(end, now):
        last, d_last = end
        index, before, inverse = now
        taken, d_out_T = _take((inputs, d_out), index, group * chunk)
        ready = _prepare(taken, chunk)
        d_out_C = _chunks(d_out_T, taken.k.shape[2], chunk)
        d_first, d_rest, d_after = _backward_state(ready, inverse, d_out_C, d_last)
        after = jnp.concatenate([before[1:], last[None]])
        gradients = _input_gradients(ready, inverse, before, after, d_out_C, d_rest, d_after)
        return (before[0], d_first), jax.tree.map(_tokens, gradients, taken)

    groups = inputs.q.shape[1] // (group * chunk)
    xs = (jnp.arange(groups), before, inverse)
    (_, d_state), d_inputs = loop(
        one_group, (last, d_last), xs, length=groups, unroll=False, reverse=True
    )
    return jax.tree.map(_join, d_inputs), d_state


chunk_scan.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def detached_scan(inputs: Inputs, state, corrects: bool, chunk: int, group: int):
    """`chunk_scan` in numbers, whose gradient is that of S' = M S + R with M and R held constant.

    dS = Mᵀ dS', and nothing reaches the inputs or comes from the output. Kept for the backward pass
    is M alone, (K, K) per value head however many tokens; without a correction it is a number.
    """
    return _forward(inputs, state, corrects, chunk, group)[0]


def _detached_forward(inputs, state, corrects, chunk, group):
    def one_chunk(carry, now):
        state, M = carry
        state, (out, _) = _one_chunk(state, now)
        return (state, _forget(M, now)), (out, None)

    carry = (state, _identity(state, corrects))
    (state, M), out, _, _ = _scan(one_chunk, carry, inputs, corrects, chunk, group)
    return (out, state), M


def _detached_backward(corrects, chunk, group, M, cotangents):
    _, d_state = cotangents
    if corrects:
        return None, _behind(einsum("...ji,...jv->...iv", _ahead(M), _ahead(d_state)))
    return None, M * d_state


detached_scan.defvjp(_detached_forward, _detached_backward)


def _identity(state_bhkgv, corrects):
    """M of no tokens: of as many columns as rows, or the number 1."""
    b, h, K, g, _ = state_bhkgv.shape
    if not corrects:
        return jnp.ones((b, h, 1, g, 1), jnp.float32)
    return jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32)[:, None, :], (b, h, K, g, K))


def _forget(M, now):
    """M behind a chunk: what the rule makes of a state when it writes no values."""
    ready, inverse = now
    after = ready.whole * M
    if inverse is None:
        return after
    removed = _mix(inverse, ready.beta * ready.from_start * _read(ready.k, M))
    return after - _fold(ready.k, ready.to_end * removed)


def _backward_state(ready, inverse, d_out, d_state):
    """dS before the group; and dR (dU for a rule without correction) and dS' of every chunk."""
    d_written = _mix_back(ready.attended, d_out)
    d_before = _fold(ready.q, ready.from_start * d_out)

    def one_chunk(d_after, now):
        ready, inverse, d_written, d_before = now
        d_rest = d_written + ready.to_end * _read(ready.k, d_after)
        d_before += ready.whole * d_after
        if inverse is not None:
            d_rest = _mix_back(inverse, d_rest)
            d_before -= _fold(ready.k, ready.beta * ready.from_start * d_rest)
        return d_before, (d_rest, d_after)

    xs = (ready, inverse, d_written, d_before)
    d_state, (d_rest, d_after) = _over_chunks(one_chunk, d_state, xs, reverse=True)
    return d_state, d_rest, d_after


def _input_gradients(ready, inverse, before, after, d_out, d_rest, d_after) -> Inputs:
    """Of q, k, v, log decay and beta, in chunks."""
    missing, written = _write(ready, inverse, before)
    # Through S before the chunk, and S' behind it. What a decay scales, it gets the product of.
    d_q = _unread(ready.from_start * d_out, before)
    d_k = _unread(ready.to_end * written, d_after)
    d_total = _per_head(ready.q) * d_q - _per_head(ready.k) * d_k
    # Within the chunk, through P.
    d_attended = _outer(d_out, written)
    through_decay = d_attended * ready.attended
    d_scores = jnp.sum(d_attended * ready.decay, axis=3)
    d_q = _mix_keys(d_scores, ready.k) + jnp.sum(d_q, axis=4)
    d_k_within = einsum("nbhij,nbhik->nbhjk", d_scores, ready.q)
    d_beta = _total(d_rest * missing)

    if inverse is not None:
        removed = -ready.beta * ready.from_start * d_rest
        d_k_before = _unread(removed, before)
        d_total += _per_head(ready.k) * d_k_before
        d_k += d_k_before
        # And through X.
        d_A = -jnp.tril(_outer(d_rest, written), -1)
        overlaps = _overlaps(ready)
        d_beta += _behind(_total(d_A * overlaps))
        d_A *= _ahead(ready.beta)
        through_decay += d_A * overlaps
        d_overlaps = jnp.sum(d_A * ready.decay, axis=3)
        d_k_within += _mix_keys(d_overlaps + jnp.swapaxes(d_overlaps, -1, -2), ready.k)

    d_k = d_k_within + jnp.sum(d_k, axis=4)
    rows, columns = _total(through_decay), jnp.sum(through_decay, axis=-2)[..., None]
    d_total = _ahead(_total(d_total)) + rows - columns
    d_whole = jnp.sum(after * d_after, axis=(3, 5))[..., None, None]
    d_log_decay = _behind(_sum_to_end(d_total) + d_whole)
    d_q /= math.sqrt(d_q.shape[-1])
    return Inputs(d_q, d_k, ready.beta * d_rest, d_log_decay, d_beta)


def _prepare(taken: Inputs, chunk: int) -> _Group:
    h = taken.k.shape[2]
    q, k = (_chunks(x, h, chunk)[..., 0, :] for x in (taken.q, taken.k))
    v = _chunks(taken.v, h, chunk)
    log_decay, beta = (_chunks(x[..., None], h, chunk) for x in (taken.log_decay, taken.beta))
    q /= math.sqrt(q.shape[-1])
    total = chunks.running_sum(_ahead(log_decay)[..., 0])
    decay = chunks.decay(total)
    scores = einsum("nbhik,nbhjk->nbhij", q, k)
    return _Group(
        q=q, k=k, v=v, beta=beta, decay=decay,
        attended=scores[:, :, :, None] * decay,
        from_start=_behind(jnp.exp(sum(total))[..., None]),
        to_end=_behind(jnp.exp(chunks.to_end(total))[..., None]),
    )  # fmt: skip


def _overlaps(ready: _Group):
    """K Kᵀ * D."""
    return einsum("nbhik,nbhjk->nbhij", ready.k, ready.k)[:, :, :, None] * ready.decay


def _inverse(ready: _Group):
    """X."""
    return unit_lower_inverse(jnp.tril(_ahead(ready.beta) * _overlaps(ready), -1))


def _write(ready: _Group, inverse, state):
    """V - γ K S, which S does not hold yet, and U = X β (V - γ K S), which is written."""
    if inverse is None:
        return ready.v, ready.beta * ready.v
    missing = ready.v - ready.from_start * _read(ready.k, state)
    return missing, _mix(inverse, ready.beta * missing)


# Every product has one axis of a kind besides the batch: others XLA first turns around in memory.


def _read(keys, state):
    return _narrow(einsum("...ck,...kw->...cw", keys, _wide(state)), state)


def _fold(keys, values):
    """keysᵀ values, a change of the state; and the state's gradient of `_read`."""
    return _narrow(einsum("...ck,...cw->...kw", keys, _wide(values)), values)


def _unread(d_values, state):
    """d_values stateᵀ for each value head: the keys' gradient of `_read`."""
    return _ahead(einsum("...cv,...kv->...ck", _ahead(d_values), _ahead(state)))


def _wide(x_gv):
    return x_gv.reshape(*x_gv.shape[:-2], -1)


def _narrow(x_w, like_gv):
    return x_w.reshape(*x_w.shape[:-1], *like_gv.shape[-2:])


def _mix(weights, values):
    return _ahead(einsum("...ij,...jv->...iv", weights, _ahead(values)))


def _mix_back(weights, values):
    return _ahead(einsum("...ij,...iv->...jv", weights, _ahead(values)))


def _mix_keys(weights, keys):
    return einsum("...ij,...jk->...ik", weights, keys)


def _outer(values, others):
    return einsum("...iv,...jv->...ij", _ahead(values), _ahead(others))


def _total(x):
    """Sum over the last axis, kept; a product with ones is faster on CPU than a reduction."""
    return einsum("...i,ij->...j", x, jnp.ones((x.shape[-1], 1), jnp.float32))


def _per_head(keys_nbhck):
    return keys_nbhck[..., None, :]


def _ahead(x_cgv):
    """(..., c, g, v) -> (..., g, c, v)"""
    return jnp.swapaxes(x_cgv, -3, -2)


_behind = _ahead  # its own inverse


def _sum_to_end(x_nbhgc1):
    """Of each token and all behind it: what the running sum does to gradients."""
    lower = jnp.tril(jnp.ones((x_nbhgc1.shape[-2],) * 2, jnp.float32))
    return einsum("...ix,ij->...jx", x_nbhgc1, lower)


def _take(tree, index, length):
    """The tokens of group `index`, as (B, length, ...)."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * length, length, axis=1), tree)


def _chunks(x_BTHD, h, chunk):
    """(B, T, hg, D) -> float32 (n, B, h, C, g, D)."""
    B, _, H, D = x_BTHD.shape
    x = x_BTHD.reshape(B, -1, chunk, h, H // h, D)
    return jnp.moveaxis(x, (1, 3), (0, 2)).astype(jnp.float32)


def _tokens(x_nBhC, like_BTHD):
    """The inverse of `_chunks`: shape and dtype of tokens `like_BTHD`."""
    x = jnp.moveaxis(x_nBhC, (0, 2), (1, 3))
    return x.reshape(like_BTHD.shape).astype(like_BTHD.dtype)


def _join(x_groups):
    """(groups, B, T of a group, ...) -> (B, T, ...)."""
    x = jnp.moveaxis(x_groups, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _over_chunks(body, carry, xs, *, reverse=False):
    length = len(jax.tree.leaves(xs)[0])
    written_out = length <= MAX_WRITTEN_OUT
    return loop(body, carry, xs, length=length, unroll=written_out, reverse=reverse)
