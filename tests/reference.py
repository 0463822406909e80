"""One mind in plain numpy, float64, a loop over tokens: the oracle of wake, sleep and rollout.

Written from Algorithm 1 of arXiv 2605.26099 and the formulas of the blocks; it shares nothing
with the library but the names of the parameters. Attention knows absolute places and rotates
raw keys anew at every use.
"""

import jax
import numpy as np


def local_rule(q_THK, k_THK, v_THV, g_TH, beta_TH, state_HKV, rule="gated_delta"):
    """The four rules, head by head and token by token. Returns out_THV and the state."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q_THK, k_THK, v_THV, g_TH, beta_TH))
    T, H, V = v.shape
    group, K = H // k.shape[1], k.shape[2]
    out, state = np.zeros((T, H, V)), np.array(state_HKV, np.float64)
    for t in range(T):
        for h in range(H):
            key, query = k[t, h // group], q[t, h // group]
            a = np.exp(g[t, h]) if rule in ("gated_delta", "gated_hebbian") else 1.0
            kept = state[h]
            if rule in ("gated_delta", "delta"):
                kept = (np.eye(K) - beta[t, h] * np.outer(key, key)) @ kept
            state[h] = a * kept + beta[t, h] * np.outer(key, v[t, h])
            out[t, h] = state[h].T @ query / np.sqrt(K)
    return out, state


def rotate(x_THD, place_T, base):
    """Pairs (i, i + D/2) as complex numbers, turned by place * base^(-2i/D)."""
    half = x_THD.shape[-1] // 2
    turn = np.exp(1j * np.outer(place_T, base ** (-np.arange(half) / half)))[:, None]
    z = (x_THD[..., :half] + 1j * x_THD[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def attend(q_THD, k_SGD, v_SGD, may_look_TS):
    """Softmax attention, head by head; query heads h share key head h // (H / G)."""
    T, H, D = q_THD.shape
    group = H // k_SGD.shape[1]
    out = np.zeros((T, H, v_SGD.shape[-1]))
    for t, h in np.ndindex(T, H):
        seen = np.flatnonzero(may_look_TS[t])
        score = k_SGD[seen, h // group] @ q_THD[t, h] / np.sqrt(D)
        weight = np.exp(score - score.max())
        out[t, h] = weight / weight.sum() @ v_SGD[seen, h // group]
    return out


def convolve(x_TC, kernel_WC, past_WC):
    """Causal convolution behind `past_WC`. Returns y_TC and the last width - 1 inputs."""
    width = len(kernel_WC)
    joined = np.concatenate([past_WC, x_TC])
    y = [(joined[t : t + width] * kernel_WC).sum(0) for t in range(len(x_TC))]
    return np.array(y).reshape(x_TC.shape), joined[len(joined) - (width - 1) :]


def rms_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def l2_norm(x, eps):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Mind:
    """One row. Blocks are known by their place (part, index in the period, repeat)."""

    def __init__(self, params, config):
        self.config = config
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.states, self.kept, self.tails = {}, {}, {}
        for place, letter in self.places():
            if letter == "A":
                empty = np.zeros((0, config.num_kv_heads, config.head_dim))
                self.kept[place] = (empty, empty)
            else:
                H, K, V = config.num_value_heads, config.key_dim, config.value_dim
                self.states[place] = np.zeros((H, K, V))
                channels = 2 * config.num_key_heads * K + H * V
                self.tails[place] = np.zeros((config.conv_width - 1, channels))

    def places(self, part=None):
        for name in ("prelude", "core", "coda") if part is None else (part,):
            period, repeats = self.config.blocks(name)
            for repeat in range(repeats):
                for index, letter in enumerate(period):
                    yield (name, index, repeat), letter

    def live(self, tokens, passes):
        """Reads one window of tokens, then sleeps. Returns the logits of the first pass."""
        before = dict(self.states)
        self.wrote_kept, self.wrote_tails = {}, {}  # of the first pass
        x = self.embed(tokens)
        for part in ("prelude", "core"):
            x = self.run(part, x, keep=True)
        features = x
        y = self.run("coda", x, keep=True)
        for _ in range(passes - 1):
            x = self.run("core", x)
        if passes > 1:
            for place, _ in self.places("coda"):
                if place in before:
                    self.states[place] = before[place]
            self.run("coda", x)
        self.evict()
        self.features = features
        return self.logits(y)

    def embed(self, tokens):
        x = self.params["embedding"][np.asarray(tokens, int)]
        if self.config.learned_positions:
            x = x + self.params["positions"][: len(tokens)]
        return x

    def logits(self, y):
        y = rms_norm(y, self.params["final_norm"], self.config.norm_eps)
        tied = self.config.tie_embeddings
        return y @ (self.params["embedding"].T if tied else self.params["head"])

    def evict(self):
        last = self.config.window - 1
        for place, new in self.wrote_kept.items():
            if self.config.eviction == "sliding":
                joined = (np.concatenate(pair) for pair in zip(self.kept[place], new, strict=True))
                self.kept[place] = tuple(x[max(len(x) - last, 0) :] for x in joined)
        if self.config.conv_carry:
            self.tails.update(self.wrote_tails)

    def run(self, part, x, keep=False):
        for place, letter in self.places(part):
            x = self.block(place, letter, x, keep)
        return x

    def block(self, place, letter, x, keep):
        p = self.of(place, letter)
        block = self.attention_block if letter == "A" else self.delta_block
        x = block(p, x, place, keep)
        return x + self.mlp(p, rms_norm(x, p["mlp_norm"], self.config.norm_eps))

    def of(self, place, letter):
        """The parameters of a block."""
        part, index, repeat = place
        kind = {"A": "attention", "G": "gated_delta"}[letter]
        return {name: array[repeat] for name, array in self.params[part][f"{index}_{kind}"].items()}

    def attention_block(self, p, x, place, keep):
        c, T = self.config, len(x)
        h = rms_norm(x, p["attention_norm"], c.norm_eps)
        q = (h @ p["query"]).reshape(T, c.num_heads, c.head_dim)
        k = (h @ p["key"]).reshape(T, c.num_kv_heads, c.head_dim)
        v = (h @ p["value"]).reshape(T, c.num_kv_heads, c.head_dim)
        if keep:
            self.wrote_kept[place] = (k, v)
        kept_k, kept_v = self.kept[place]
        place_T = np.arange(T)
        place_S = np.arange(-len(kept_k), T)
        distance = place_T[:, None] - place_S
        out = attend(
            rotate(q, place_T, c.rope_base),
            rotate(np.concatenate([kept_k, k]), place_S, c.rope_base),
            np.concatenate([kept_v, v]),
            (distance >= 0) & (distance < c.window),
        )
        return x + out.reshape(T, c.num_heads * c.head_dim) @ p["out"]

    def delta_block(self, p, x, place, keep):
        c, T = self.config, len(x)
        Hk, H, K, V = c.num_key_heads, c.num_value_heads, c.key_dim, c.value_dim
        h = rms_norm(x, p["delta_norm"], c.norm_eps)
        mixed = np.concatenate([h @ p["query"], h @ p["key"], h @ p["value"]], axis=-1)
        mixed, tail = convolve(mixed, p["conv"], self.tails[place])
        q, k, v = np.split(silu(mixed), [Hk * K, 2 * Hk * K], axis=-1)
        q, k = (l2_norm(a.reshape(T, Hk, K), c.norm_eps) for a in (q, k))
        g = -np.exp(p["A_log"]) * np.log1p(np.exp(h @ p["timestep"] + p["dt_bias"]))
        beta = c.beta_max * sigmoid(h @ p["beta"])
        out, self.states[place] = local_rule(
            q, k, v.reshape(T, H, V), g, beta, self.states[place], c.rule
        )
        if keep:
            self.wrote_tails[place] = tail
        out = rms_norm(out, p["out_norm"], c.norm_eps).reshape(T, H * V)
        return x + (out * silu(h @ p["gate"])) @ p["out"]

    def mlp(self, p, h):
        inner = h @ p["mlp_in"]
        inner = silu(h @ p["mlp_gate"]) * inner if self.config.mlp == "swiglu" else gelu(inner)
        return inner @ p["mlp_out"]


def fast_weights(minds):
    """The states of several minds, stacked as the library stacks them: (R, B, H, K, V)."""
    config = minds[0].config
    tree = {}
    for part in ("prelude", "core", "coda"):
        period, repeats = config.blocks(part)
        tree[part] = tuple(
            None if letter == "A" else np.stack(
                [np.stack([mind.states[part, i, r] for mind in minds]) for r in range(repeats)]
            )
            for i, letter in enumerate(period)
        )  # fmt: skip
    return tree
