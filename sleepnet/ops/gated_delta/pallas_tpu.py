"""The chunked local rule as one TPU kernel (Pallas, Mosaic): what a chunk needs stays in VMEM.

The grid is (B, groups of heads, chunks). Along the chunks, which run in order, the block of the
final state stays in VMEM and carries S; decays, K Kᵀ, the inverse, U and the output of a chunk
never leave it. HBM sees q, k, v, g, beta and the first state once, the output and the last state
once. Arrays lie flat, (B, T, heads * width), so that a block of heads is a block of lanes, and a
key head is read by the value heads that it serves.

`chunked` is `gated_delta.chunked` in all but speed. Its gradient is that of `gated_delta.chunked`,
which computes the forward pass again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from sleepnet.config.checks import choices
from sleepnet.config.model import KERNEL_CHUNKS, as_kernel_chunk
from sleepnet.integers import as_integer
from sleepnet.ops import gated_delta
from sleepnet.ops.exact import einsum
from sleepnet.ops.gated_delta import chunks

DTYPES = ("float32", "bfloat16")
CHUNK = 64  # tokens of a chunk, if the caller has no wish
HEADS = 8  # per grid step: enough independent products to keep the matrix unit busy
BLOCK = 16  # rows of the triangular system that are solved without the matrix unit
LANES = 128


def chunked(
    q_BTHK,
    k_BTHK,
    v_BTHV,
    g_BTH,
    beta_BTH,
    state_BHKV=None,
    *,
    rule="gated_delta",
    chunk=None,
    group=None,
    detached=False,
    interpret=False,
):
    """`gated_delta.chunked` by the TPU kernel, to the same arguments and results.

    Args:
      chunk: tokens per chunk, one of `config.KERNEL_CHUNKS`; by default `CHUNK`, or the
        least that holds all tokens.
      group: of `gated_delta.chunked` in the gradient.
      detached: as for `gated_delta.chunked`; M is computed by XLA's form.
      interpret: run the kernel's operations one by one on any platform, to check its numbers.

    Raises:
      ValueError: shapes that do not fit, a dtype that is none of `DTYPES`, another chunk; and,
        when lowered for anything but a TPU, the platform.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, rule)
    state = chunks.initial(k_BTHK, v_BTHV, state_BHKV)
    fitting = [size for size in KERNEL_CHUNKS if size >= v_BTHV.shape[1]]
    size = min([*fitting, CHUNK]) if chunk is None else as_kernel_chunk(chunk)
    group = None if group is None else as_integer("group", group, 1)
    kind = _detached if detached else _with_gradient
    form = functools.partial(kind, rule, size, group, interpret)
    return form(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state)


def _check(q, k, v, g, beta, rule):
    chunks.check_inputs(q, k, v, g, beta, rule)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in DTYPES:
            raise ValueError(choices(f"dtype of {name}", x.dtype.name, DTYPES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _with_gradient(rule, size, group, interpret, *inputs):
    return _forward(rule, size, interpret, *inputs)


def _save(rule, size, group, interpret, *inputs):
    return _forward(rule, size, interpret, *inputs), inputs


def _backward(rule, size, group, interpret, inputs, cotangents):
    form = functools.partial(gated_delta.chunked, rule=rule, chunk=size, group=group)
    return jax.vjp(form, *inputs)[1](cotangents)


_with_gradient.defvjp(_save, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _detached(rule, size, group, interpret, *inputs):
    return _forward(rule, size, interpret, *inputs)


def _save_map(rule, size, group, interpret, *inputs):
    _, k, v, g, beta, _ = inputs
    M, _ = gated_delta.summarize(k, v, g, beta, rule=rule, chunk=size)
    return _forward(rule, size, interpret, *inputs), M


def _detached_backward(rule, size, group, interpret, M_BHKK, cotangents):
    _, d_state = cotangents
    return *[None] * 5, einsum("bhji,bhjv->bhiv", M_BHKK, d_state)


_detached.defvjp(_save_map, _detached_backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(rule, size, interpret, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV):
    B, T, Hk, K = k_BTHK.shape
    H, V = v_BTHV.shape[2:]
    short = max(size - T, 0)  # a block may overlap the end, but not be larger than the array
    q, k, v = (_flat(x, short) for x in (q_BTHK, k_BTHK, v_BTHV))
    g = g_BTH if rule.startswith("gated") else jnp.zeros_like(g_BTH)
    heads = heads_per_step(Hk, H, K, V)
    g, beta = (_gate_blocks(x, size, heads) for x in (g, beta_BTH))
    coarse, rest = chunks.running_sum(g)
    if not interpret:
        q = _only_on_tpu.bind(q)
    keys = max(heads * Hk // H, 1)
    shared = H // Hk // heads or 1  # steps that read the same key head
    grid = (B, H // heads, pl.cdiv(T, size))
    key_spec = pl.BlockSpec((None, size, keys * K), lambda b, h, n: (b, n, lax.div(h, shared)))
    value_spec = pl.BlockSpec((None, size, heads * V), lambda b, h, n: (b, n, h))
    gate_spec = pl.BlockSpec((None, None, None, heads, size), lambda b, h, n: (b, h, n, 0, 0))
    state_spec = pl.BlockSpec((None, heads, K, V), lambda b, h, n: (b, h, 0, 0))
    out, state = pl.pallas_call(
        functools.partial(_one_chunk, rule=rule, keys=keys, T=T),
        grid=grid,
        in_specs=[key_spec, key_spec, value_spec, *[gate_spec] * 3, state_spec],
        out_specs=[value_spec, state_spec],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state_BHKV.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=cost(B, T, Hk, H, K, V, q.dtype, v.dtype, rule=rule, size=size),
        interpret=interpret,
        name=f"{rule}_chunks",
    )(q, k, v, coarse, rest, beta, state_BHKV)
    return out[:, :T].reshape(B, T, H, V), state


def heads_per_step(Hk, H, K, V):
    """How many value heads a grid step takes: up to `HEADS`, in whole tiles of lanes."""
    group = H // Hk

    def fits(heads):
        keys = max(heads // group, 1)
        whole = heads % group == 0 or group % heads == 0
        key_lanes = keys * K % LANES == 0 or keys == Hk
        return whole and key_lanes and (heads * V % LANES == 0 or heads == H)

    fitting = [heads for heads in range(1, H + 1) if H % heads == 0 and fits(heads)]
    few = [heads for heads in fitting if heads <= HEADS and heads * K * V <= HEADS * LANES**2]
    return max(few, default=fitting[0])


def cost(B, T, Hk, H, K, V, key_dtype, value_dtype, *, rule, size):
    """What the kernel does, counted from its blocks: XLA cannot look into it."""
    heads = heads_per_step(Hk, H, K, V)
    keys, steps = max(heads * Hk // H, 1), B * (H // heads) * pl.cdiv(T, size)
    per_step = size * (2 * keys * K * key_dtype.itemsize + 2 * heads * V * value_dtype.itemsize)
    gates = 3 * 4 * heads * size
    states = 2 * 4 * B * H * K * V
    # FLOPs / 2 of a key head, and of a value head.
    of_key, of_value = size * size * K, size * size * V + 2 * size * K * V
    if chunks.corrects(rule):
        of_key *= 2
        of_value += size * K * V + size * (size + BLOCK) // 2 * V
    return pl.CostEstimate(
        flops=2 * steps * (keys * of_key + heads * of_value),
        transcendentals=steps * heads * (size * size + 2 * size),
        bytes_accessed=steps * (per_step + gates) + states,
    )


def _flat(x_BTHK, short):
    """(B, T, H, K) -> (B, T, H * K), at least a chunk long."""
    B, T, H, K = x_BTHK.shape
    return jnp.pad(x_BTHK.reshape(B, T, H * K), ((0, 0), (0, short), (0, 0)))


def _gate_blocks(x_BTH, size, heads):
    """(B, T, H) -> (B, steps of heads, N, heads, C) in float32; zeros behind the end leave S."""
    B, T, H = x_BTH.shape
    x = jnp.pad(x_BTH.astype(jnp.float32), ((0, 0), (0, -T % size), (0, 0)))
    return jnp.transpose(x.reshape(B, -1, size, H // heads, heads), (0, 3, 1, 4, 2))


def _one_chunk(
    q_ref, k_ref, v_ref, coarse_ref, rest_ref, beta_ref, start_ref, out_ref, state_ref, *, rule,
    keys, T,
):  # fmt: skip
    """One chunk of some heads; `state_ref` is the same block from the first chunk to the last."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = start_ref[...]

    heads, K, V = state_ref.shape
    C = out_ref.shape[0]
    k, v = (_without_end(ref[...], T) for ref in (k_ref, v_ref))
    q, k, v = _heads(q_ref[...], keys), _heads(k, keys), _heads(v, heads).astype(jnp.float32)
    total = coarse_ref[...], rest_ref[...]  # (heads, C)
    decay = chunks.decay(total)
    from_start, to_end, beta = (
        x[..., None] for x in (jnp.exp(sum(total)), jnp.exp(chunks.to_end(total)), beta_ref[...])
    )
    attended = _share(_inner(q, k), heads) * decay
    state = state_ref[...]
    if chunks.corrects(rule):
        A = beta * _share(_inner(k, k), heads) * decay
        found = _product("hck,hkv->hcv", _share(jnp.concatenate([q, k], axis=1), heads), state)
        u = _solve(A, beta * (v - from_start * found[:, C:]))
    else:
        found = _product("hck,hkv->hcv", _share(q, heads), state)
        u = beta * v
    out = from_start * found[:, :C] + einsum("hij,hjv->hiv", attended, u)
    out = (out / math.sqrt(K)).astype(out_ref.dtype)
    for h in range(heads):
        out_ref[:, h * V : (h + 1) * V] = out[h]
    whole = from_start[:, -1:]
    state_ref[...] = whole * state + _product("hck,hcv->hkv", _share(k, heads), to_end * u)


def _without_end(x_CD, T):
    """Rows behind the last token hold whatever lies there."""
    C = x_CD.shape[0]
    if T % C == 0:
        return x_CD
    place = pl.program_id(2) * C + lax.broadcasted_iota(jnp.int32, x_CD.shape, 0)
    return jnp.where(place < T, x_CD, jnp.zeros_like(x_CD))


def _heads(x_CD, heads):
    """(C, heads * width) -> (heads, C, width)."""
    width = x_CD.shape[1] // heads
    return jnp.stack([x_CD[:, h * width : (h + 1) * width] for h in range(heads)])


def _share(x_hCC, heads):
    """Key heads, each repeated for the value heads that it serves in this step."""
    group = heads // x_hCC.shape[0]
    return x_hCC if group == 1 else jnp.stack([x_hCC[h // group] for h in range(heads)])


def _inner(x_hCK, y_hCK):
    """Products of rows. Those of bfloat16 are exact in float32 as they are."""
    if x_hCK.dtype == jnp.bfloat16:
        return jnp.einsum("hik,hjk->hij", x_hCK, y_hCK, preferred_element_type=jnp.float32)
    return einsum("hik,hjk->hij", x_hCK, y_hCK)


def _product(axes, x, y):
    """Of float32 y by x of either dtype, in full float32.

    That is six passes of bfloat16 through the matrix unit; when x is bfloat16, its lower parts
    are zero, and the three with the parts of y are all.
    """
    if x.dtype != jnp.bfloat16:
        return einsum(axes, x, y)
    total = jnp.zeros((), jnp.float32)
    for _ in range(3):
        part = y.astype(jnp.bfloat16)
        total = total + jnp.einsum(axes, x, part, preferred_element_type=jnp.float32)
        y = y - part.astype(jnp.float32)
    return total


def _solve(A_hCC, r_hCV):
    """(I + tril(A, -1))⁻¹ R, `BLOCK` rows after another."""
    blocks = range(0, A_hCC.shape[-1], BLOCK)
    diagonal = _small_inverse(jnp.stack([A_hCC[:, i : i + BLOCK, i : i + BLOCK] for i in blocks]))
    solved = []
    for i in blocks:
        rows = r_hCV[:, i : i + BLOCK]
        if i:
            before = jnp.concatenate(solved, axis=1)
            rows = rows - einsum("hij,hjv->hiv", A_hCC[:, i : i + BLOCK, :i], before)
        solved.append(einsum("hij,hjv->hiv", diagonal[i // BLOCK], rows))
    return jnp.concatenate(solved, axis=1)


def _small_inverse(A_nhij):
    """(I + tril(A, -1))⁻¹ of small blocks by forward substitution, column after column."""
    size = A_nhij.shape[-1]
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    A = jnp.where(row > column, A_nhij, 0.0)
    X = jnp.broadcast_to((row == column).astype(jnp.float32), A.shape)
    for j in range(size - 1):
        X = X - A[..., :, j : j + 1] * X[..., j : j + 1, :]
    return X


_only_on_tpu = Primitive("only_on_tpu")
_only_on_tpu.def_abstract_eval(lambda x: x)
batching.defvectorized(_only_on_tpu)
mlir.register_lowering(_only_on_tpu, lambda context, x: [x], platform="tpu")


def _refuse(context, x):
    raise ValueError(
        f"backend: 'pallas' is a kernel for TPU, and this program is lowered for "
        f"{', '.join(context.module_context.platforms)}; allowed here: 'xla'"
    )


mlir.register_lowering(_only_on_tpu, _refuse)
