"""Sampling: the next token drawn from logits, each row in its own way.

Draw i of a session takes its randomness from the session's seed and i alone. So a saved sampler is
its `Sampling` and a count, and what a row draws does not depend on the rows beside it.
"""

import dataclasses
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sleepnet.config import ConfigError
from sleepnet.config.checks import MAX_SEED
from sleepnet.integers import as_integer
from sleepnet.types import Array

_ALL = np.iinfo(np.int32).max
_LEAST, _MOST = map(float, (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: logits over `temperature`, then `top_k`, then `top_p` of what is left.

    temperature: 0 takes the likeliest token, the first of equals; 1 the model's distribution.
    top_k: only the so many likeliest, the first of equals; None: all.
    top_p: only the fewest likeliest whose probabilities together reach it; 1: all.
    seed: of all draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _check_float(self, "temperature", 0.0, _MOST, "0 (the likeliest token) or more")
        if self.top_k is not None:
            _check_int(self, "top_k", 1, _ALL, ", or None for all")
        _check_float(self, "top_p", 0.0, 1.0, "above 0, and at most 1 (all tokens)")
        if not self.top_p:
            raise ConfigError(
                "top_p must lie above 0; got 0; for the likeliest token alone set temperature=0"
            )
        _check_int(self, "seed", 0, MAX_SEED)


def as_sampling(value) -> Sampling:
    """Raises ValueError for what is none."""
    if not isinstance(value, Sampling):
        raise ValueError(
            f"sampling must be a Sampling, such as Sampling(temperature=0); got {value!r}"
        )
    return value


def stop_ids(stop, vocab_size: int) -> frozenset[int]:
    """Raises ValueError for what is no collection of ids of the vocabulary."""
    if isinstance(stop, str) or not isinstance(stop, Collection):
        raise ValueError(f"stop must be a collection of token ids, such as {{3}}; got {stop!r}")
    return frozenset(as_integer("each id of stop", token, 0, vocab_size - 1) for token in stop)


@struct.dataclass
class Samplers:
    """`Sampling` of each row, as arrays; from `stack`.

    key_B2: uint32, the seed's two halves.
    temperature_B, top_p_B: float32.
    top_k_B: int32; where all tokens may be drawn, the largest there is.
    """

    key_B2: Any
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any


def stack(samplings: Sequence[Sampling]) -> Samplers:
    """One row for each; NumPy arrays."""
    return Samplers(
        key_B2=np.array([divmod(s.seed, 1 << 32) for s in samplings], np.uint32),
        temperature_B=np.array(
            [s.temperature if s.temperature >= _LEAST else 0 for s in samplings], np.float32
        ),
        top_k_B=np.array([s.top_k or _ALL for s in samplings], np.int32),
        top_p_B=np.array([max(s.top_p, _LEAST) for s in samplings], np.float32),
    )


@jax.jit
def sample(logits_BY, draw_B, samplers: Samplers) -> Array:
    """Draws one token per row; one program for all ways to draw.

    Args:
      logits_BY: float32.
      draw_B: uint32, the number of each row's draw: each has randomness of its own.

    Returns:
      tokens_B, int32: -1 in rows whose logits are not numbers.
    """
    peak_BY = jnp.max(logits_BY, axis=-1, keepdims=True)
    greedy_B = samplers.temperature_B == 0
    heat_B = jnp.where(greedy_B, 1.0, samplers.temperature_B)
    scaled_BY = (logits_BY - peak_BY) / heat_B[:, None]  # the likeliest stays finite in any heat
    noise_BY = jax.vmap(_noise, in_axes=(0, 0, None))(samplers.key_B2, draw_B, logits_BY.shape[-1])
    noisy_BY = scaled_BY + jnp.where(greedy_B[:, None], 0.0, noise_BY)
    is_cut_B = ~greedy_B & ((samplers.top_k_B < logits_BY.shape[-1]) | (samplers.top_p_B < 1))
    allowed_BY = jax.lax.cond(
        jnp.any(is_cut_B),  # costs more than all else
        jax.vmap(_allowed),
        lambda scaled_BY, *_: jnp.ones(scaled_BY.shape, bool),
        scaled_BY, samplers.top_k_B, samplers.top_p_B,
    )  # fmt: skip
    tokens_B = jnp.argmax(jnp.where(allowed_BY, noisy_BY, -jnp.inf), axis=-1).astype(jnp.int32)
    # XLA's maximum may step over a NaN.
    are_numbers_B = jnp.isfinite(peak_BY[:, 0]) & ~jnp.isnan(logits_BY).any(axis=-1)
    return jnp.where(are_numbers_B, tokens_B, -1)


def _noise(key_2, draw, Y):
    """The likeliest token after adding it is a draw (the Gumbel-max trick)."""
    key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, draw), (Y,), jnp.float32)


def _allowed(scaled_Y, top_k, top_p):
    """Which tokens may be drawn."""
    of_k_Y = _largest(scaled_Y, jnp.ones_like(scaled_Y), top_k.astype(jnp.float32))
    p_Y = jax.nn.softmax(jnp.where(of_k_Y, scaled_Y, -jnp.inf))
    return of_k_Y & ((top_p >= 1) | _largest(scaled_Y, p_Y, top_p))


def _largest(x_Y, weight_Y, enough):
    """The fewest largest, the first of equals, whose weights together reach `enough`, or all.

    Weights of equal x are equal, those of the last perhaps 0. The least of the largest is found by
    halving all float32 as often as they have bits: many times faster than sorting a vocabulary.
    """
    one_zero_Y = jnp.where(x_Y == 0, 0.0, x_Y)  # of two that are equal and differ in their bits
    bits_Y = jax.lax.bitcast_convert_type(one_zero_Y, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    rank_Y = jnp.where(bits_Y >= sign, ~bits_Y, bits_Y | sign)  # in the order of x

    def weight_of(chosen_Y):
        return jnp.where(chosen_Y, weight_Y, 0.0).sum()

    def halve(i, least):
        higher = least | (sign >> i.astype(jnp.uint32))
        return jnp.where(weight_of(rank_Y >= higher) >= enough, higher, least)

    least = jax.lax.fori_loop(0, 32, halve, jnp.uint32(0))
    equal_Y = rank_Y == least
    equals_before_Y = (jnp.cumsum(equal_Y) - 1).astype(jnp.float32)
    before_Y = weight_of(rank_Y > least) + weight_Y * equals_before_Y
    return (rank_Y > least) | (equal_Y & (before_Y < enough))


def _check_int(sampling: Sampling, name: str, low: int, high: int, note: str = ""):
    value = as_integer(name, getattr(sampling, name), low, high, note=note, error=ConfigError)
    object.__setattr__(sampling, name, value)


def _check_float(sampling: Sampling, name: str, low, high, allowed: str):
    value = getattr(sampling, name)
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or value != value:
        raise ConfigError(f"{name} must be {allowed}; got {value!r}")
    if not low <= value <= high:
        near = min(max(value, low), high)
        raise ConfigError(f"{name} must be {allowed}; got {value}; the nearest is {near}")
    object.__setattr__(sampling, name, float(value))
