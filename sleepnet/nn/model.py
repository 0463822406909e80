"""The network: embedding, blocks by pattern, head. `blocks` is the engine of everything.

A wake pass is embed + prelude + core + coda + logits; a sleep pass is the core over the
features of the pass before. Both are `blocks`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.nn.fsdp import used_whole, whole
from sleepnet.nn.layers import BLOCKS
from sleepnet.ops import norm
from sleepnet.ops.scan import loop
from sleepnet.types import AttentionCache, DeltaCache, Span

NAMES = {"A": "attention", "G": "gated_delta"}


@functools.partial(jax.jit, static_argnames="config")
def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Random parameters: a nested dictionary of arrays in `config.param_dtype`.

    The blocks of a part are stacked over the repeats of its shortest period:
    `params["core"]["0_attention"]["query"]` is (R, D, H * head_dim) for the pattern "AGAG".
    """
    embedding_key, position_key, head_key, *part_keys = jax.random.split(key, 3 + len(PARTS))
    std, dtype = config.init_embedding_std, config.param_dtype
    shape = (config.vocab_size, config.d_model)
    params: dict = {
        "embedding": _normal(embedding_key, shape, std, dtype),
        "final_norm": jnp.ones((config.d_model,), dtype),
    }
    if config.learned_positions:
        shape = (config.window, config.d_model)
        params["positions"] = _normal(position_key, shape, 0.1 * std, dtype)
    if not config.tie_embeddings:
        shape = (config.d_model, config.vocab_size)
        scale = math.sqrt(config.init_scale / config.d_model)
        params["head"] = _normal(head_key, shape, scale, dtype)
    for part, part_key in zip(PARTS, part_keys, strict=True):
        params[part] = _init_part(config, part, part_key)
    return params


def check_params(params, config: ModelConfig):
    """Raises ValueError for parameters that were made for another config."""
    expected = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    if jax.tree.structure(params) != jax.tree.structure(expected):
        raise ValueError(
            f"the parameters are those of another config than one of pattern {config.pattern!r}"
        )
    check_arrays("the parameters are those of another config", expected, params)


def check_arrays(trouble: str, expected, given):
    """Raises ValueError, which begins with the trouble, for the first array of another shape or
    dtype in a tree of the same structure."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(given), strict=True)
    for (path, wanted), leaf in pairs:
        if (wanted.shape, wanted.dtype) != (leaf.shape, leaf.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{trouble}: {name} must have shape {wanted.shape} and dtype {wanted.dtype}; got "
                f"{leaf.shape} and {leaf.dtype}"
            )


def embed(params, tokens_BT, position_BT, *, config: ModelConfig):
    """Token ids (B, T) and their places in the window -> features x_BTD in the compute dtype."""
    x_BTD = whole(params["embedding"])[tokens_BT]
    if config.learned_positions:
        x_BTD = x_BTD + whole(params["positions"])[position_BT]
    return x_BTD.astype(config.compute_dtype)


def blocks(
    params, x_BTD, past: tuple, span: Span, *, config: ModelConfig, part: str,
    detached: bool = False,
):  # fmt: skip
    """Runs T tokens through the blocks of one part.

    Args:
      params: of the whole network.
      x_BTD: features of the tokens.
      past: what each block of the period goes on from, stacked over repeats: a tuple of
        `AttentionCache` segments for A, a `DeltaCache` for G.
      span: the tokens' places.
      part: "prelude", "core" or "coda".
      detached: parameters, features, keys, values and tails are constants; gradients go through
        the states alone, which are affine in those of `past`.

    Returns:
      y_BTD, and per block what these tokens wrote, stacked over repeats: their own keys and
      values for A, the new state and tail for G.
    """
    period, repeats = config.blocks(part)
    if not period:
        return x_BTD, ()

    def one_period(x_BTD, stacked):
        params, past = stacked
        written = []
        for name, block_past in zip(_names(period), past, strict=True):
            x_BTD, block_written = _apply(
                config, name, params[name], x_BTD, block_past, span, detached
            )
            written.append(block_written)
        return x_BTD, tuple(written)

    stacked = (params[part], past)
    if detached:
        x_BTD, stacked = lax.stop_gradient(x_BTD), _all_but_states_constant(stacked)
    return loop(one_period, x_BTD, stacked, length=repeats, unroll=config.unroll)


def logits(params, y_BTD, *, config: ModelConfig):
    """Features behind the last block (..., D) -> float32 logits (..., Y)."""
    name = "embedding" if config.tie_embeddings else "head"

    @used_whole
    def apply(params, y_BTD):
        y = norm.rms_norm(y_BTD, params["final_norm"], eps=config.norm_eps)
        head = params[name].T if config.tie_embeddings else params[name]
        return jnp.dot(
            y, head.astype(y.dtype),
            precision=config.matmul_precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    return apply({key: params[key] for key in ("final_norm", name)}, y_BTD)


def nll(logits, targets):
    """Compute -log p(target) in nats, float32.

    Args:
      logits: float32 (..., Y).
      targets: int token ids (...).

    Returns:
      (...), NaN where a target lies outside the vocabulary.
    """
    targets = targets.astype(jnp.int32)
    # A negative index would count from the end.
    targets = jnp.where(targets < 0, logits.shape[-1], targets)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1, mode="fill")[..., 0]


def empty_past(
    config: ModelConfig, batch_size: int, part: str, segments: tuple[int, ...]
) -> tuple[Any, ...]:
    """Zeros for every block of `part`, with attention segments of the given numbers of slots."""
    period, repeats = config.blocks(part)
    return tuple(_empty_block(config, letter, (repeats, batch_size), segments) for letter in period)


def conv_channels(config: ModelConfig) -> int:
    """Channels of the short convolution: queries, keys and values side by side."""
    keys = config.num_key_heads * config.key_dim
    return 2 * keys + config.num_value_heads * config.value_dim


def _empty_block(config, letter, leading, segments):
    dtype = config.compute_dtype
    if letter == "A":
        shapes = [(*leading, config.num_kv_heads, slots, config.head_dim) for slots in segments]
        return tuple(AttentionCache(*(jnp.zeros(shape, dtype) for _ in "kv")) for shape in shapes)
    state = (*leading, config.num_value_heads, config.key_dim, config.value_dim)
    tail = (*leading, config.conv_width - 1, conv_channels(config))
    return DeltaCache(jnp.zeros(state, jnp.float32), jnp.zeros(tail, dtype))


def _names(period: str) -> list[str]:
    return [f"{i}_{NAMES[letter]}" for i, letter in enumerate(period)]


def _all_but_states_constant(stacked):
    params, past = lax.stop_gradient(stacked)
    return params, tuple(
        dataclasses.replace(constant, state=given.state) if isinstance(given, DeltaCache)
        else constant
        for given, constant in zip(stacked[1], past, strict=True)
    )  # fmt: skip


def _block(config, name, *, detached=False):
    letter = next(letter for letter, kind in NAMES.items() if name.endswith(kind))
    return BLOCKS[letter](config, detached=detached)


def _apply(config, name, params, x_BTD, past, span, detached):
    def apply(params, x_BTD, past, span):
        return _block(config, name, detached=detached).apply({"params": params}, x_BTD, past, span)

    run = used_whole(apply)
    if "block" in config.remat_levels and not detached:  # which keeps next to nothing
        run = jax.checkpoint(run)
    return run(params, x_BTD, past, span)


def _init_part(config: ModelConfig, part: str, key: jax.Array) -> dict:
    period, repeats = config.blocks(part)
    if not period:
        return {}
    x = jnp.zeros((1, 1, config.d_model), config.compute_dtype)
    place = jnp.zeros((1, 1), jnp.int32)
    span = Span(position_BT=place, length_B=place[0], masks=(jnp.ones((1, 1, 1), bool),))
    params = {}
    for name, letter, block_key in zip(
        _names(period), period, jax.random.split(key, len(period)), strict=True
    ):
        past = _empty_block(config, letter, (1,), segments=())

        def init_one(key, name=name, past=past):
            return _block(config, name).init(key, x, past, span)["params"]

        params[name] = jax.vmap(init_one)(jax.random.split(block_key, repeats))
    return params


def _normal(key, shape, std, dtype):
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
