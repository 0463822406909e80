"""Choices of the network and of how it sleeps.

The paper (Lee et al. 2026, arXiv 2605.26099) leaves much unsaid. What it leaves open is a named
field here; its comment says "our choice".
"""

import dataclasses
import re
from typing import Any

from sleepnet.config import checks
from sleepnet.config.checks import FOLLOWS, ConfigError, choices
from sleepnet.integers import as_integer

PARTS = ("prelude", "core", "coda")
RULES = ("gated_delta", "delta", "gated_hebbian", "hebbian")
EVICTIONS = ("hard", "sliding")
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "high", "highest")
BACKENDS = ("xla", "pallas")
REMAT_LEVELS = ("window", "pass", "block")
CONV_INITS = ("identity", "uniform")
MLPS = ("gelu", "swiglu")
MAX_CHUNK = 1024  # beyond it, sums of strong decays are no longer exact
KERNEL_CHUNKS = (16, 32, 64, 128)  # of the TPU kernel, whose tiles of bfloat16 have 16 rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and how it sleeps.

    `pattern` is the architecture: A is a block of window attention, G a block of
    gated delta rule, each followed by its MLP. Brackets mark the core, the part
    that sleep repeats: in "GG[AGAG]G" the prelude is GG and the coda G. Without
    brackets every block is core.
    """

    vocab_size: int
    pattern: str = "AGAG"
    d_model: int = 256
    window: int = 24  # tokens per window, L
    passes: int = 4  # N; N = 1 is the plain hybrid with eviction
    # Passes of a window, its last, that gradients reach; in those before, they go back through the
    # fast weights alone (`sleepnet.cycle.sleep.refine`). None: all. Our choice.
    gradient_passes: int = FOLLOWS
    eviction: str = "hard"  # what leaves at a boundary: all keys and values, or all but L - 1

    # Window attention.
    num_heads: int = 4
    num_kv_heads: int = FOLLOWS  # grouped heads; None: num_heads
    head_dim: int = FOLLOWS  # None: d_model // num_heads
    rope_base: float = 10_000.0  # our choice: positions restart in every window
    learned_positions: bool = False  # our choice: adds an embedding of the position in the window

    # Fast weights: one (key_dim, value_dim) matrix per value head.
    rule: str = "gated_delta"
    num_key_heads: int = FOLLOWS  # None: num_heads
    num_value_heads: int = FOLLOWS  # None: num_key_heads; a multiple of it
    key_dim: int = FOLLOWS  # per head; None: head_dim
    value_dim: int = FOLLOWS  # per head; None: key_dim
    beta_max: float = 1.0  # write strength lies in (0, beta_max); 2 allows negative eigenvalues
    conv_width: int = 4  # short causal convolution before q, k and v; 1 is none of the past
    conv_carry: bool = False  # our choice: the convolution starts from zeros in every window
    chunk: int = FOLLOWS  # tokens per chunk of the rule; None: by length and platform
    chunk_group: int = FOLLOWS  # chunks prepared at once; None: by heads and platform

    # The rest of a block.
    mlp: str = "gelu"  # our choice
    mlp_ratio: float = 4.0  # our choice: hidden width over d_model
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # our choice

    # Initialisation, all our choice.
    init_scale: float = 1.0  # matrices ~ N(0, init_scale / fan_in)
    init_residual_scale: float = FOLLOWS  # of those into the residual; None: 1/sqrt(2 blocks)
    init_embedding_std: float = 1.0
    init_decay_rate: tuple[float, float] = (1.0, 1.0)  # exp(A_log) ~ U(low, high), per head
    init_timestep: tuple[float, float] = (0.01, 0.03)  # softplus(dt_bias), log-uniform, per head
    conv_init: str = "identity"  # a kernel near the identity, or uniform in 1/sqrt(width)

    # Numbers. Fast weights, log decays, norms and softmax are float32 whatever stands here, and
    # the products that touch a fast weight always run at the highest precision.
    param_dtype: str = "float32"  # bfloat16 for inference alone; training needs float32
    compute_dtype: str = "float32"
    matmul_precision: str = "default"  # of all other products

    # Compilation.
    backend: str = "xla"  # of the rule over several tokens on one device; "pallas": a TPU kernel
    remat: str = "none"  # what backward recomputes: "window", "pass", "block", or several by "+"
    unroll: bool = False  # write loops over blocks, passes and windows out: small models run faster

    def __post_init__(self):
        checks.normalize(self)
        checks.positive(
            self, "vocab_size", "d_model", "window", "passes", "num_heads", "conv_width"
        )
        checks.positive(
            self, "mlp_ratio", "norm_eps", "rope_base", "init_scale", "init_embedding_std"
        )
        checks.positive_if_given(self, "gradient_passes")
        checks.positive_if_given(
            self, "num_kv_heads", "head_dim", "num_key_heads", "num_value_heads"
        )
        checks.positive_if_given(
            self, "key_dim", "value_dim", "chunk", "chunk_group", "init_residual_scale"
        )
        checks.one_of(self, "eviction", EVICTIONS)
        checks.one_of(self, "rule", RULES)
        checks.one_of(self, "mlp", MLPS)
        checks.one_of(self, "conv_init", CONV_INITS)
        checks.one_of(self, "param_dtype", DTYPES)
        checks.one_of(self, "compute_dtype", DTYPES)
        checks.one_of(self, "matmul_precision", PRECISIONS)
        checks.one_of(self, "backend", BACKENDS)
        checks.one_of(self, "beta_max", (1.0, 2.0))
        checks.ordered_pair(self, "init_decay_rate", low=1e-3)  # its logarithm is taken
        checks.ordered_pair(
            self, "init_timestep", low=0.01
        )  # smaller steps round to dead heads in bfloat16
        if self.head_dim is None:
            checks.divides(self, "num_heads", "d_model")
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        checks.default(self, "num_kv_heads", self.num_heads)
        checks.default(self, "num_key_heads", self.num_heads)
        checks.default(self, "num_value_heads", self.num_key_heads)
        checks.default(self, "key_dim", self.head_dim)
        checks.default(self, "value_dim", self.key_dim)
        checks.divides(self, "num_kv_heads", "num_heads")
        checks.divides(self, "num_key_heads", "num_value_heads")
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim must be even, because rotary positions turn pairs; got {self.head_dim}"
            )
        if round(self.mlp_ratio * self.d_model) < 1:
            raise ConfigError(
                f"mlp_ratio must give the MLP a width of 1 or more with d_model={self.d_model}; "
                f"got {self.mlp_ratio}; the nearest is {1 / self.d_model}"
            )
        if self.chunk is not None:
            as_chunk(self.chunk)
            if self.backend == "pallas":
                as_kernel_chunk(self.chunk)
        unknown = self.remat_levels - set(REMAT_LEVELS)
        if unknown:
            alone = ("none",) if len(self.remat_levels) == 1 else ()
            raise ConfigError(choices("remat", "+".join(sorted(unknown)), (*alone, *REMAT_LEVELS)))
        split_pattern(self.pattern)  # raises

    @property
    def remat_levels(self) -> frozenset[str]:
        """The levels at which the backward pass recomputes the forward pass."""
        return frozenset() if self.remat == "none" else frozenset(self.remat.split("+"))

    def detached_passes(self, passes: int) -> int:
        """How many of a window's passes, its first, no gradient reaches."""
        return max(0, passes - (self.gradient_passes or passes))

    @property
    def gated(self) -> bool:
        """Whether the local rule forgets: a_t < 1."""
        return self.rule.startswith("gated")

    def blocks(self, part: str) -> tuple[str, int]:
        """The shortest period of `part` and how often it repeats, e.g. ("AG", 2) for "AGAG"."""
        return shortest_period(split_pattern(self.pattern)[part])

    @property
    def num_blocks(self) -> int:
        """Blocks in prelude, core and coda together."""
        return sum(len(letters) for letters in split_pattern(self.pattern).values())


def as_chunk(chunk: Any) -> int:
    """Return tokens per chunk of the local rule as a Python int, or raise ConfigError."""
    chunk = as_integer("chunk", chunk, 1, MAX_CHUNK, error=ConfigError)
    if chunk & (chunk - 1):
        near = 1 << (chunk.bit_length() - 1)
        raise ConfigError(f"chunk must be a power of two, such as {near}; got {chunk}")
    return chunk


def as_kernel_chunk(chunk: Any) -> int:
    """Return tokens per chunk of the TPU kernel as a Python int, or raise ConfigError."""
    chunk = as_integer("chunk", chunk, error=ConfigError)
    if chunk not in KERNEL_CHUNKS:
        near = min(KERNEL_CHUNKS, key=lambda size: abs(size - chunk))
        raise ConfigError(
            f"chunk: backend='pallas' takes {', '.join(map(str, KERNEL_CHUNKS))}; got {chunk}; "
            f"the nearest is {near}"
        )
    return chunk


def check_trainable(model: ModelConfig):
    """Raise ConfigError for parameters too coarse to be trained.

    In bfloat16 the neighbours of 1.0 lie 4e-3 and 8e-3 away: norms and embeddings, whose updates
    are about as large as the learning rate, would never move. Inference takes either dtype.
    """
    if model.param_dtype != "float32":
        raise ConfigError(
            f"model.param_dtype must be float32 in training, because smaller updates are rounded "
            f"away; got {model.param_dtype!r}; to compute in bfloat16 set "
            f"model.compute_dtype=bfloat16 and model.param_dtype=float32"
        )


def split_pattern(pattern: str) -> dict[str, str]:
    """The parts: "GG[AGAG]G" -> {"prelude": "GG", "core": "AGAG", "coda": "G"}.

    Raises:
      ConfigError: letters other than A and G, unbalanced brackets, or an empty core.
    """
    bare = pattern if "[" in pattern or "]" in pattern else f"[{pattern}]"
    match = re.fullmatch(r"([AG]*)\[([AG]+)\]([AG]*)", bare)
    if match is None:
        letters = re.sub(r"[^AG]", "", pattern.upper()) or "AGAG"
        raise ConfigError(
            f"pattern must be letters A (window attention) and G (gated delta), with at most one "
            f"pair of brackets around a core that is not empty, such as 'AGAG' or 'GG[AGAG]G'; "
            f"got {pattern!r}; the nearest is {letters!r}"
        )
    return dict(zip(PARTS, match.groups(), strict=True))


def shortest_period(letters: str) -> tuple[str, int]:
    """The shortest string whose repetition is `letters`: "AGAG" -> ("AG", 2)."""
    for size in range(1, len(letters) + 1):
        period, repeats = letters[:size], len(letters) // size
        if period * repeats == letters:
            return period, repeats
    return "", 0
