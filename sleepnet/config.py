"""Every choice of a run, as frozen dataclasses that are validated when they are made.

`ModelConfig` describes the network and how it sleeps, `DepoConfig`, `Rule110Config`, `FactsConfig`
and `TextConfig` the tasks, `TrainingConfig` the optimisation, `MeshConfig` the devices,
`EvaluationConfig` the measurement, and `ExperimentConfig` binds them and checks that they fit.

The paper (Lee et al. 2026, arXiv 2605.26099) leaves much unsaid. What it leaves
open is a named field here; its comment says "our choice".
"""

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

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
GATHERS = ("block", "step")
SCHEDULES = ("constant", "cosine")
ON_BAD_STEP = ("stop", "skip", "rollback")
ON_SAVE_ERROR = ("stop", "continue")
SPECIAL_TOKENS = ("text", "control")
MAX_SEED = 2**63 - 1
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # in size, that float32 holds
MAX_B2 = 0.999999  # 1 - b2, by which a first step divides, is 0 in float32 soon after
MAX_CHUNK = 1024  # beyond it, sums of strong decays are no longer exact
KERNEL_CHUNKS = (16, 32, 64, 128)  # of the TPU kernel, whose tiles of bfloat16 have 16 rows


FOLLOWS: Any = None  # the default of a field that is set from others when the config is made


class ConfigError(ValueError):
    """A field that cannot be: the message names it, what is allowed and the nearest choice."""


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
    # fast weights alone (`sleepnet.sleep.refine`). None: all. Our choice.
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
        _check_types(self)
        _positive(self, "vocab_size", "d_model", "window", "passes", "num_heads", "conv_width")
        _positive(self, "mlp_ratio", "norm_eps", "rope_base", "init_scale", "init_embedding_std")
        _positive_if_given(self, "gradient_passes")
        _positive_if_given(self, "num_kv_heads", "head_dim", "num_key_heads", "num_value_heads")
        _positive_if_given(
            self, "key_dim", "value_dim", "chunk", "chunk_group", "init_residual_scale"
        )
        _one_of(self, "eviction", EVICTIONS)
        _one_of(self, "rule", RULES)
        _one_of(self, "mlp", MLPS)
        _one_of(self, "conv_init", CONV_INITS)
        _one_of(self, "param_dtype", DTYPES)
        _one_of(self, "compute_dtype", DTYPES)
        _one_of(self, "matmul_precision", PRECISIONS)
        _one_of(self, "backend", BACKENDS)
        _one_of(self, "beta_max", (1.0, 2.0))
        _range(self, "init_decay_rate", low=1e-3)  # its logarithm is taken
        _range(self, "init_timestep", low=0.01)  # smaller steps round to dead heads in bfloat16
        if self.head_dim is None:
            _divides(self, "num_heads", "d_model")
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        _default(self, "num_kv_heads", self.num_heads)
        _default(self, "num_key_heads", self.num_heads)
        _default(self, "num_value_heads", self.num_key_heads)
        _default(self, "key_dim", self.head_dim)
        _default(self, "value_dim", self.key_dim)
        _divides(self, "num_kv_heads", "num_heads")
        _divides(self, "num_key_heads", "num_value_heads")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepoConfig:
    """Depo: a directed cycle told as shuffled edges, then questions "k hops from here?".

    A context of `nodes` edges "u v" fills windows of `window` tokens; questions
    follow in windows of their own. A node's name is a word of `min_word` to
    `max_word` tokens out of `symbols`; when words may be longer than one token,
    the last token of each is marked as the end of the word.

    The paper's setting (PAPER: Depo, 75 nodes): nodes=75, window=75, hops=16,
    symbols=50, max_word=2, queries=10, min_nodes=3. In a training cycle of n < k nodes
    the walk goes round.
    """

    name: str = "depo"
    nodes: int = 8  # of the longest cycle; every test cycle has this many
    min_nodes: int = FOLLOWS  # training cycles vary in size from here; None: always `nodes`
    hops: int = 4  # k is uniform on 1..hops
    test_hops: tuple[int, ...] = FOLLOWS  # the k that evaluation asks; None: 1..hops
    symbols: int = 8
    min_word: int = 1
    max_word: int = 1
    queries: int = 8  # with distinct starts; fewer when the cycle is smaller
    window: int = 8
    curriculum: int = 0  # training examples over which the largest k rises from 1 to hops
    test_fraction: float = 0.1  # of all cycles, kept from training
    seed: int = 0

    def __post_init__(self):
        _check_types(self)
        _one_of(self, "name", ("depo",))
        _positive(self, "nodes", "hops", "symbols", "min_word", "max_word", "queries", "window")
        _fraction(self, "test_fraction")
        _default(self, "min_nodes", self.nodes)
        _default(self, "test_hops", tuple(range(1, self.hops + 1)))
        _not_negative(self, "curriculum")
        _in_range(self, "seed", 0, MAX_SEED)
        _in_range(self, "min_nodes", 3, self.nodes)
        _in_range(self, "min_word", 1, self.max_word)
        _in_range(self, "queries", 1, self.nodes)
        _in_range(self, "hops", 1, self.nodes - 1)  # k = nodes asks nothing: it leads back
        rising = list(self.test_hops) == sorted(set(self.test_hops))
        within = all(1 <= k <= self.hops for k in self.test_hops)
        if not self.test_hops or not rising or not within:
            raise ConfigError(f"test_hops must rise within 1..{self.hops}; got {self.test_hops}")
        words = sum(self.symbols**size for size in range(self.min_word, self.max_word + 1))
        if words < self.nodes:
            raise ConfigError(
                f"symbols={self.symbols} with words of {self.min_word} to {self.max_word} tokens "
                f"name only {words} nodes, and nodes is {self.nodes}; set symbols to {self.nodes}"
            )
        if words > MAX_SEED:
            raise ConfigError(
                f"symbols={self.symbols} with words of up to {self.max_word} tokens make {words} "
                f"words, and at most 2**63 - 1 can be numbered; lower max_word"
            )
        if self.query_tokens > self.window:
            raise ConfigError(
                f"a question takes up to {self.query_tokens} tokens and must fit a window; "
                f"got window={self.window}"
            )

    @property
    def query_tokens(self) -> int:
        """Tokens of the longest question with the part of its answer that is read."""
        # hop, start word, and for longer words an answer mark and the answer but its last token.
        return 1 + self.max_word + (self.max_word if self.max_word > 1 else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule110Config:
    """Rule 110: bits evolve on a periodic ring; asked is a bit after t steps.

    Each of `strings` windows holds one random state of `cells` bits; then come
    questions, one window or several, each about one bit of one string.

    The paper's setting: cells=24, strings=4, steps=(32,), cells_asked=1 (bit 0),
    questions=4.
    """

    name: str = "rule110"
    cells: int = 24  # of the ring, and tokens of each context window
    strings: int = 4
    steps: tuple[int, ...] = (32,)  # the t that are asked; one t holds for a whole example
    cells_asked: int = 1  # questions are about cells 0..cells_asked - 1
    questions: int = 4
    window: int = 24
    curriculum: int = 0  # training examples over which t opens up from the first of `steps`
    test_fraction: float = 0.1  # of all states, kept from training
    seed: int = 0

    def __post_init__(self):
        _check_types(self)
        _one_of(self, "name", ("rule110",))
        _positive(self, "cells", "strings", "cells_asked", "questions", "window")
        _fraction(self, "test_fraction")
        _not_negative(self, "curriculum")
        _in_range(self, "seed", 0, MAX_SEED)
        _in_range(self, "cells", 3, min(self.window, 62))
        _in_range(self, "cells_asked", 1, self.cells)
        _in_range(self, "questions", 1, self.strings * self.cells_asked)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ConfigError(f"steps must rise from 1 or more, such as (4, 8); got {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """Facts: "key value" pairs in a stream of distractors, then questions "which value had this?".

    The stream is laid out in pages of `page` tokens. A fact stands on one page; everything else is
    noise; all questions stand on the last page. A question's depth is how many pages lie from its
    fact's page to its own: where a window is a page, as it is by default, so many times does the
    model sleep in between. With `window` as long as the whole stream, the same tokens are one
    window: for models that keep all of it.
    """

    name: str = "facts"
    facts: int = 4  # of each example, with distinct keys
    keys: int = 16
    values: int = 16
    noise: int = 16  # tokens that distract
    depths: tuple[int, ...] = (1, 2, 4, 8)  # each fact's is one of them
    queries: int = FOLLOWS  # facts that are asked; None: all
    window: int = 8
    page: int = FOLLOWS  # divides `window`; None: a window is a page
    curriculum: int = 0  # training examples over which depths open up from the first
    test_fraction: float = 0.1  # of all sets of facts, kept from training
    seed: int = 0

    def __post_init__(self):
        _check_types(self)
        _one_of(self, "name", ("facts",))
        _positive(self, "facts", "keys", "values", "noise", "window")
        _positive_if_given(self, "queries", "page")
        _default(self, "queries", self.facts)
        _default(self, "page", self.window)
        _divides(self, "page", "window")
        _fraction(self, "test_fraction")
        _not_negative(self, "curriculum")
        _in_range(self, "seed", 0, MAX_SEED)
        _in_range(self, "facts", 1, min(self.keys, self.page // 2))  # one page has room for all
        _in_range(self, "queries", 1, self.facts)
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ConfigError(f"depths must rise from 1 or more, such as (1, 8); got {self.depths}")
        if self.window > self.tokens:
            raise ConfigError(
                f"window must be at most {self.tokens}, the tokens of the whole stream; got "
                f"{self.window}"
            )

    @property
    def tokens(self) -> int:
        """Of the whole stream, the page of questions too."""
        return (self.depths[-1] + 1) * self.page


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text: documents over several windows, every token predicted from those before it.

    A document begins at a window's start, from a newborn mind; one of more than `windows` windows
    is cut, and each piece begins newborn. Every window is scored, and every window sleeps.

    Files are .jsonl, an object a line, or .array_record: of such objects, or of tokens as
    `launch.tokenize` writes them. A path that exists is taken as it stands, and any other as a
    pattern. A file may not be named twice; a copy of it may, and counts its text twice. A file of
    test text that is trained on is refused, also as a copy or as tokens; documents that stand in
    different files of both are not looked for.
    """

    name: str = "text"
    train_files: tuple[str, ...] = ()  # paths or patterns
    test_files: tuple[str, ...] = ()  # held out
    text_field: str = "text"  # of the objects
    tokenizer: str = "bytes"  # or the path of a JSON file of the tokenizers package
    # How special tokens are read that stand written in documents and prompts: as "text", like any
    # other; or as "control", the special tokens themselves.
    special_tokens: str = "text"
    window: int = 64
    windows: int = 8  # of each example, W
    seed: int = 0  # of the order
    # What was read, as "name: content": the tokenizer, then file by file; None: as it is found. A
    # run goes on only with the same content, wherever it now lies.
    fingerprints: tuple[str, ...] = FOLLOWS

    def __post_init__(self):
        _check_types(self)
        _paths(self, "train_files", "test_files", "tokenizer")
        _one_of(self, "name", ("text",))
        _one_of(self, "special_tokens", SPECIAL_TOKENS)
        _positive(self, "window", "windows")
        _in_range(self, "seed", 0, MAX_SEED)
        for path in sorted({*self.train_files} & {*self.test_files}):
            raise ConfigError(f"test_files: {path!r} is in train_files too, so it is not held out")


def contents(fingerprints: Iterable[str]) -> tuple[str, ...]:
    """The contents that `TextConfig.fingerprints` tell of, without the names of the files."""
    return tuple(fingerprint.rpartition(": ")[2] for fingerprint in fingerprints)


TASKS = {"depo": DepoConfig, "rule110": Rule110Config, "facts": FactsConfig, "text": TextConfig}
TaskConfig = DepoConfig | Rule110Config | FactsConfig | TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation and bookkeeping of one run."""

    steps: int = 1000
    batch_size: int = 64  # examples of a step, over all devices of all processes
    parts: int = 1  # of a batch, one after the other; gradients are summed (accumulation)
    seed: int = 0  # of the parameters; the data has the task's own

    muon_learning_rate: float = 2e-3  # of the blocks' matrices (paper: tuned at N = 1)
    adam_learning_rate: float = 5e-5  # of everything else
    # Of the blocks' matrices; and of embedding, learned positions and head. Norms, convolutions,
    # A_log and dt_bias never decay.
    muon_weight_decay: float = 0.0
    adam_weight_decay: float = 0.0
    adam_b2: float = 0.95
    # Our choice: after warm-up, constant or a cosine down to 0. By the step of the run, skipped
    # steps too.
    schedule: str = "constant"
    warmup_steps: int = 0  # linear, from 0
    # Share of steps, at the end, over which a constant falls to 0; at most those after warm-up.
    decay_fraction: float = 0.0
    clip_norm: float = 1.0  # global; our choice

    log_every: int = 20
    checkpoint_every: int = 200
    checkpoints_kept: int = 3
    evaluate_every: int = 0  # steps between held-out measurements; 0: never
    evaluate_examples: int = 256
    best_kept: int = 0  # checkpoints of the highest held-out accuracy, besides the newest

    # A bad step has a loss or gradient that is not finite, or one that is `spike_factor` times the
    # median of the last good steps (0: never). The run stops; or leaves the update out; or goes
    # back to a checkpoint at least `rollback_steps` before it, and on with the batches after it.
    on_bad_step: str = "stop"
    spike_factor: float = 0.0
    spike_window: int = 64
    skips_in_a_row: int = 10  # so many are allowed, then the run stops
    rollback_steps: int = 50
    rollbacks: int = 3  # likewise

    on_save_error: str = "stop"  # when a disk is full, say: stop, or continue and try again
    # So many seconds without a sign of life, such as a step, are told with the stacks of all
    # threads (0: never). With `stall_stops` the program then ends, for whoever starts it again; but
    # not while it restores or compiles, which are one call each: how long they take depends on the
    # model, and started again they would take as long.
    stall_seconds: float = 600.0
    stall_stops: bool = False

    def __post_init__(self):
        _check_types(self)
        _positive(self, "steps", "batch_size", "parts", "muon_learning_rate", "adam_learning_rate")
        _positive(self, "clip_norm", "log_every", "checkpoint_every", "checkpoints_kept")
        _in_range(self, "seed", 0, MAX_SEED)
        _not_negative(self, "muon_weight_decay", "adam_weight_decay", "warmup_steps")
        _positive(self, "evaluate_examples", "spike_window", "rollback_steps", "skips_in_a_row")
        _not_negative(self, "evaluate_every", "best_kept", "spike_factor", "rollbacks")
        _not_negative(self, "stall_seconds")
        _one_of(self, "schedule", SCHEDULES)
        _one_of(self, "on_bad_step", ON_BAD_STEP)
        _one_of(self, "on_save_error", ON_SAVE_ERROR)
        _in_range(self, "decay_fraction", 0.0, 1.0)
        _in_range(self, "adam_b2", 0.0, MAX_B2)
        _divides(self, "parts", "batch_size")
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"spike_factor must be above 1, or 0 for never; got {self.spike_factor}"
            )
        if self.best_kept and not self.evaluate_every:
            raise ConfigError(
                f"best_kept={self.best_kept} needs evaluate_every above 0: the best are known by "
                f"their held-out accuracy"
            )
        if self.evaluate_every % self.log_every:
            near = max(1, round(self.evaluate_every / self.log_every)) * self.log_every
            raise ConfigError(
                f"evaluate_every must be a multiple of log_every={self.log_every}; got "
                f"{self.evaluate_every}; the nearest is {near}"
            )
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps must be below steps={self.steps}; got {self.warmup_steps}; the "
                f"nearest is {self.steps - 1}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out measurement."""

    examples: int = 1024
    batch_size: int = 128
    passes: tuple[int, ...] = (1, 2, 4)  # every N at which the model is evaluated
    streaming_examples: int = 16  # of them, how many also go through wake and sleep token by token

    def __post_init__(self):
        _check_types(self)
        _positive(self, "examples", "batch_size")
        _not_negative(self, "streaming_examples")
        if not self.passes or min(self.passes) < 1:
            raise ConfigError(f"passes must be integers of 1 or more; got {self.passes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How training lies on the devices of all processes; results depend on it only by rounding.

    The batch is split over data x fsdp devices. Parameters and optimizer state are split over fsdp,
    and copied over data.
    """

    data: int = FOLLOWS  # None: all devices that fsdp leaves
    fsdp: int = 1
    # Split parameters are gathered where a block runs, again in each pass and window; or once a
    # step, for which every device needs room for all of them and for their gradients.
    gather: str = "block"

    def __post_init__(self):
        _check_types(self)
        _positive(self, "fsdp")
        _positive_if_given(self, "data")
        _one_of(self, "gather", GATHERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One run: model, task, training, mesh and evaluation that fit each other."""

    model: ModelConfig
    task: TaskConfig
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self):
        if self.model.window != self.task.window:
            raise ConfigError(
                f"model.window is {self.model.window} and task.window is {self.task.window}; "
                f"leave model.window out, and it follows the task"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, ready for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, tuple[type, ...]] = {
    "task": tuple(TASKS.values()),
    "model": (ModelConfig,),
    "training": (TrainingConfig,),
    "mesh": (MeshConfig,),
    "evaluation": (EvaluationConfig,),
}


def fields_at(path: str) -> list[dataclasses.Field]:
    """The fields that "section.field" names: of "task", one of each task that has it."""
    section, _, name = path.partition(".")
    classes = SECTIONS.get(section, ())
    return [field for cls in classes for field in dataclasses.fields(cls) if field.name == name]


def field_paths() -> list[str]:
    """Every "section.field"; those of all tasks, too."""
    return [
        f"{section}.{field.name}"
        for section, classes in SECTIONS.items()
        for cls in classes
        for field in dataclasses.fields(cls)
    ]


def from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """Builds and validates an experiment from nested dictionaries.

    Raises:
      ConfigError: an unknown, missing or impossible field, with its full path.
    """
    for section in (values, *(values.values() if isinstance(values, dict) else ())):
        if not isinstance(section, dict):
            raise ConfigError(f"the config and its sections must be dictionaries; got {section!r}")
    values = dict(values)
    _known("", values, [field.name for field in dataclasses.fields(ExperimentConfig)])
    for needed in ("model", "task"):
        if needed not in values:
            raise ConfigError(f"the config has no section {needed!r}")
    task = dict(values["task"])
    name = task.get("name")
    if name not in TASKS:
        raise ConfigError(choices("task.name", name, TASKS))
    return ExperimentConfig(
        task=_build("task", TASKS[name], task),  # whose window the model's follows
        model=_build("model", ModelConfig, values["model"]),
        training=_build("training", TrainingConfig, values.get("training", {})),
        mesh=_build("mesh", MeshConfig, values.get("mesh", {})),
        evaluation=_build("evaluation", EvaluationConfig, values.get("evaluation", {})),
    )


def _build(section: str, cls: type, values: dict[str, Any]):
    _known(f"{section}.", values, [field.name for field in dataclasses.fields(cls)])
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from None
    except TypeError as error:
        raise ConfigError(f"{section}: {error}") from None


def _check_types(config):
    """Rejects e.g. a string where a number belongs, before it fails somewhere deep.

    Lists become tuples, and NumPy's numbers Python's, so that a config is hashable, can be a
    static argument, and can be written as JSON.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is FOLLOWS:
            continue
        value = tuple(value) if isinstance(value, list) else value
        value = _plain(field.name, value, typing.get_origin(field.type) or field.type)
        if isinstance(value, tuple):
            kind, *_ = typing.get_args(field.type)
            value = tuple(_plain(f"each of {field.name}", element, kind) for element in value)
        object.__setattr__(config, field.name, value)


def _plain(name: str, value: Any, kind: Any) -> Any:
    """The value as Python's own type, if it is of this kind; an integer may stand for a float."""
    if kind is int:
        return as_integer(name, value, error=ConfigError)
    if kind is float:
        return _plain_float(name, value)
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be of type {kind.__name__}; got {value!r}")
    return value


def _plain_float(name: str, value: Any) -> float:
    if isinstance(value, float | np.floating):
        value = float(value)
    else:
        try:
            value = as_integer(name, value)
        except ValueError:
            raise ConfigError(f"{name} must be of type float; got {value!r}") from None
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite; got {value}")
    if value and not LEAST_FLOAT <= abs(value) <= MOST_FLOAT:
        near = min(max(abs(value), LEAST_FLOAT), MOST_FLOAT) * (1 if value > 0 else -1)
        raise ConfigError(
            f"{name} must be 0, or between {LEAST_FLOAT:.3g} and {MOST_FLOAT:.3g} in size, which "
            f"float32 holds; got {value}; the nearest is {near:.3g}"
        )
    return value


def _known(prefix: str, values: Iterable[str], allowed: Iterable[str]):
    for key in values:
        if key not in allowed:
            raise ConfigError(choices(f"{prefix}{key}", key, allowed, what="no such field"))


def nearest(value: Any, allowed: Iterable[Any]) -> str:
    """The allowed value that looks most like `value`."""
    names = [str(name) for name in allowed]
    return difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)[0]


def choices(name: str, value: Any, allowed: Iterable[Any], what: str | None = None) -> str:
    """The message for a value that is none of those allowed."""
    allowed = list(allowed)
    reason = what or f"got {value!r}"
    listed = ", ".join(str(choice) for choice in allowed)
    return f"{name}: {reason}; allowed: {listed}; the nearest is {nearest(value, allowed)!r}"


# One slash is what pathlib leaves; of other names it may be a file and its argument, or a host. One
# letter is a Windows drive.
_URL = re.compile(r"([a-z][a-z0-9+.-]+(?=://)|gs|gcs|s3|file):/+", re.IGNORECASE)


def local_path(given: str) -> str:
    """Expand ~ and ~user, and refuse what no file of this machine can be called.

    Returns:
      The path, or what is no path but a name of its own (as tokenizer="bytes"), unchanged.

    Raises:
      ConfigError: a URL, an empty path, or the home of a user that is not known. The message lacks
        the value and who gave it, for callers to put in front.
    """
    if not given:
        raise ConfigError("the path is empty; leave it out, or name a file or folder")
    if match := _URL.match(given):
        raise ConfigError(_no_url(match[1].lower(), given[match.end() :]))
    if not given.startswith("~"):
        return given
    user, path = given[1:].partition("/")[0], os.path.expanduser(given)
    if path == given or (not user and os.environ.get("HOME") == ""):
        reason = f"there is no user {user!r} here" if user else "your home is unknown (see HOME)"
        raise ConfigError(f"{reason}; give the path from the root, such as /home/NAME/...")
    return path


def _no_url(scheme: str, rest: str) -> str:
    """Return the message for a URL, with the path that may take its place."""
    if scheme == "file":
        return f"a URL is not a path; the nearest is /{rest}"
    bucket = rest.partition("/")[0] or "BUCKET"
    how = f" (gcsfuse --implicit-dirs {bucket} /mnt/{bucket})" if scheme in ("gs", "gcs") else ""
    return (
        f"a URL is not a path: mount what {scheme}:// names{how} and give the path there, such as "
        f"/mnt/{rest or bucket}"
    )


def _paths(config, *names: str):
    """Expand fields that hold a path or several, and refuse URLs."""

    def local(name, given):
        try:
            return local_path(given)
        except ConfigError as error:
            raise ConfigError(f"{name}={given!r}: {error}") from None

    for name in names:
        value = getattr(config, name)
        several = isinstance(value, tuple)
        paths = tuple(local(name, each) for each in value) if several else local(name, value)
        object.__setattr__(config, name, paths)


def _one_of(config, name: str, allowed: Iterable[Any]):
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(choices(name, value, allowed))


def _positive(config, *names: str):
    for name in names:
        if not getattr(config, name) > 0:
            kind = next(field.type for field in dataclasses.fields(config) if field.name == name)
            near = "; the nearest is 1" if kind is int else ""
            raise ConfigError(f"{name} must be above 0; got {getattr(config, name)}{near}")


def _positive_if_given(config, *names: str):
    _positive(config, *(name for name in names if getattr(config, name) is not None))


def _not_negative(config, *names: str):
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigError(
                f"{name} must be 0 or more; got {getattr(config, name)}; the nearest is 0"
            )


def _fraction(config, name: str):
    value = getattr(config, name)
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} must lie strictly between 0 and 1; got {value}")


def _in_range(config, name: str, low: float, high: float):
    value = getattr(config, name)
    if not low <= value <= high:
        near = min(max(value, low), high)
        raise ConfigError(f"{name} must lie in {low}..{high}; got {value}; the nearest is {near}")


def _range(config, name: str, low: float):
    value = getattr(config, name)
    if len(value) != 2 or not low <= value[0] <= value[1] or value[1] <= 0:
        raise ConfigError(f"{name} must be (low, high) with {low} <= low <= high; got {value}")


def _divides(config, small: str, large: str):
    a, b = getattr(config, small), getattr(config, large)
    if b % a:
        near = min((d for d in range(1, b + 1) if b % d == 0), key=lambda d: abs(d - a))
        raise ConfigError(f"{small} must divide {large}={b}; got {a}; the nearest is {near}")


def _default(config, name: str, value: Any):
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)
