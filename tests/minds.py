"""Two small minds that together use every choice of the network, and a stream for them to live.

The tests of wake, sleep and rollout share these configurations and shapes, and with them the
compiled programs.
"""

import dataclasses
import functools

import jax
import numpy as np
from reference import Mind

import sleepnet

# Grouped heads of both kinds, K != V, a repeated core, a coda with fast weights.
HARD = sleepnet.ModelConfig(
    vocab_size=13,
    pattern="[AGAG]G",
    d_model=16,
    window=6,
    passes=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_key_heads=2,
    num_value_heads=4,
    key_dim=6,
    value_dim=4,
)
SLIDING = dataclasses.replace(
    HARD,
    pattern="G[AG]A",
    eviction="sliding",
    conv_carry=True,
    beta_max=2.0,
    mlp="swiglu",
    tie_embeddings=True,
    learned_positions=True,
    conv_init="uniform",
)
CONFIGS = {"hard": HARD, "sliding": SLIDING}
# For what costs a program of its own.
TINY = dataclasses.replace(HARD, pattern="AG")

B, W, L = 3, 4, HARD.window
FULL = np.full((B, W), L, np.int32)
# A row that is always full, one that skips a window, one that starts late.
RAGGED = np.array([[6, 6, 6, 6], [4, 0, 6, 2], [0, 1, 6, 5]], np.int32)


@functools.cache
def params(config):
    """Random numbers of a fitting size; nothing is zero, one or near the identity.

    Matrices into the residual are halved, so that the network does not amplify rounding: in
    float64, one part in 2^24 of noise in every parameter moves no result by more than 2e-6.
    """
    shapes = jax.eval_shape(lambda: sleepnet.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name.endswith("norm"):
            noise = 1 + 0.1 * noise
        elif name == "dt_bias":
            noise = 0.5 * noise - 3
        elif name not in ("A_log", "embedding", "positions"):
            noise = noise / np.sqrt(leaf.shape[-2])
        if name in ("out", "mlp_out"):
            noise = 0.5 * noise
        return noise.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def stream(seed=0, windows=W):
    """tokens_BWL."""
    tokens = np.random.default_rng(seed).integers(0, HARD.vocab_size, (B, windows, L))
    return tokens.astype(np.int32)


@functools.cache
def newborn(config, batch_size=B):
    return sleepnet.init_state(config, batch_size)


def woken(config, seed=0, window=0, length_B=None, state=None):
    """logits and state after one wake on a whole window."""
    state = newborn(config) if state is None else state
    logits, state = sleepnet.wake(
        params(config), state, stream(seed)[:, window], config=config, length_B=length_B
    )
    return np.asarray(logits), state


@functools.cache
def older(config):
    """Minds with one window behind them: nothing about them is zero."""
    return sleepnet.sleep(params(config), woken(config, seed=9)[1], config=config)


@functools.cache
def oracle_life(config, passes, ragged):
    """The reference minds' logits of every window, (B, W) lists of (length, Y), and the minds."""
    lengths, tokens = (RAGGED if ragged else FULL), stream()
    minds = [Mind(params(config), config) for _ in range(B)]
    logits = [
        [mind.live(tokens[b, w, : lengths[b, w]], passes) for w in range(W)]
        for b, mind in enumerate(minds)
    ]
    return logits, minds
