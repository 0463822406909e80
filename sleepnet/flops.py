"""Floating-point operations of the network, counted from the configuration.

Products of matrices only (2 m n k each); norms, gates and softmax are left out. The
backward pass takes twice the forward pass.
"""

from sleepnet.config import PARTS, ModelConfig
from sleepnet.ops.chunks import chunk_size


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


def _attention_flops(config, T, S):
    inner, grouped = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = 2 * T * config.d_model * (2 * inner + 2 * grouped)
    return projections + 4 * T * S * inner


def _delta_flops(config, T):
    H, K, V = config.num_value_heads, config.key_dim, config.value_dim
    keys, values = config.num_key_heads * K, H * V
    projections = 2 * T * config.d_model * (2 * keys + 3 * values + 2 * H)
    convolution = 2 * T * config.conv_width * (2 * keys + values)
    C = min(config.chunk or chunk_size(T), T)
    rule = T * H * (6 * K * V + C * (4 * K + 4 * V) + 2 * C * C / 3)
    return round(projections + convolution + rule)


def _mlp_flops(config, T):
    matrices = 3 if config.mlp == "swiglu" else 2
    return 2 * T * matrices * config.d_model * round(config.mlp_ratio * config.d_model)
