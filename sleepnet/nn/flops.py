"""Floating-point operations of the network, counted from the configuration.

Products of matrices only (2 m n k each); norms, gates and softmax are left out. The
backward pass takes twice the forward pass of what gradients reach.
"""

from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.ops.gated_delta.chunks import chunk_size, corrects


def part_flops(config: ModelConfig, part: str, T: int, kept: int = 0) -> int:
    """Forward FLOPs of one part over T tokens of one row that attend `kept` earlier keys too."""
    period, repeats = config.blocks(part)
    of_letter = {"A": _attention_flops(config, T, T + kept), "G": _delta_flops(config, T)}
    return repeats * sum(of_letter[letter] + _mlp_flops(config, T) for letter in period)


def window_flops(config: ModelConfig, T: int, passes: int, scored: int) -> int:
    """Forward FLOPs of one row's window: wake pass, `passes` - 1 sleep passes, logits."""
    kept = config.window - 1 if config.eviction == "sliding" else 0
    parts = {part: part_flops(config, part, T, kept) for part in PARTS}
    sleeping = (passes - 1) * parts["core"] + (parts["coda"] if passes > 1 else 0)
    return sum(parts.values()) + sleeping + 2 * scored * config.d_model * config.vocab_size


def rollout_flops(config: ModelConfig, window_passes, scored_per_window) -> int:
    """Forward FLOPs of one row of `sleepnet.rollout` with full windows."""
    return sum(
        window_flops(config, config.window, passes, scored)
        for passes, scored in zip(window_passes, scored_per_window, strict=True)
    )


def training_flops(config: ModelConfig, window_passes, scored_per_window) -> int:
    """FLOPs of one row of `sleepnet.rollout` and of its gradient; nothing is counted twice that
    `config.remat` computes twice."""
    forward = rollout_flops(config, window_passes, scored_per_window)
    return forward + sum(
        _backward_flops(config, config.window, passes, scored)
        for passes, scored in zip(window_passes, scored_per_window, strict=True)
    )


def _backward_flops(config, T, passes, scored):
    detached = config.detached_passes(passes)
    if not detached:
        return 2 * window_flops(config, T, passes, scored)
    # As many passes, the coda behind them, and the wake pass where it bears loss.
    reached = window_flops(config, T, passes - detached + 1, scored)
    maps = (detached - 1) * _map_flops(config, "core", T)
    if not scored:
        reached -= window_flops(config, T, 1, 0)
        maps += _map_flops(config, "prelude", T) + _map_flops(config, "core", T)
    return 2 * reached + maps


def _map_flops(config, part, T):
    """Of M of all G blocks, S_out = M S_in + R over T tokens, and of Mᵀ dS_out."""
    if not corrects(config.rule):
        return 0  # M is a number
    period, repeats = config.blocks(part)
    K, V, C = config.key_dim, config.value_dim, _chunk(config, T)
    of_head = T * (4 * K * K + 2 * C * K) + 2 * K * K * V
    return repeats * period.count("G") * config.num_value_heads * of_head


def _attention_flops(config, T, S):
    inner, grouped = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = 2 * T * config.d_model * (2 * inner + 2 * grouped)
    return projections + 4 * T * S * inner


def _delta_flops(config, T):
    H, K, V = config.num_value_heads, config.key_dim, config.value_dim
    keys, values = config.num_key_heads * K, H * V
    projections = 2 * T * config.d_model * (2 * keys + 3 * values + 2 * H)
    convolution = 2 * T * config.conv_width * (2 * keys + values)
    C = _chunk(config, T)
    rule = T * H * (6 * K * V + C * (4 * K + 4 * V) + 2 * C * C / 3)
    return round(projections + convolution + rule)


def _chunk(config, T):
    return min(config.chunk or chunk_size(T), T)


def _mlp_flops(config, T):
    matrices = 3 if config.mlp == "swiglu" else 2
    return 2 * T * matrices * config.d_model * round(config.mlp_ratio * config.d_model)
