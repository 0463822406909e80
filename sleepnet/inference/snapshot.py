"""Snapshots: all that a session is, except the parameters, in memory or in one file."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from sleepnet import storage, strict_json
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import cache
from sleepnet.cycle.policies import POLICIES, Policy
from sleepnet.cycle.wake import check_vocabulary
from sleepnet.inference.sampling import Sampling
from sleepnet.integers import as_integer, as_integers
from sleepnet.storage import StorageError
from sleepnet.tokenizer import CONTEXT, special_tokens_of
from sleepnet.types import WakeState

FORMAT = 1
# Fields in which the config of a snapshot may differ: numbers depend on them only by rounding.
_FREE = ("backend", "unroll", "chunk", "chunk_group", "remat", "gradient_passes")
_FREE_PREFIX = "init_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A session at some point.

    state: of one row.
    logits_Y: float32, what it expects next; None before its first token.
    opening_Y: `logits_Y` when its window was empty; None in the first window.
    tokens: ids of its window.
    preceding: up to `tokenizer.CONTEXT` ids before its window, on which its text may depend.
    position: tokens read in its life.
    sleeps: in its life.
    policy, sampling: how it sleeps and draws.
    tokenizer: identity of what its text was read with; None without.
    """

    state: WakeState
    logits_Y: Any = None
    opening_Y: Any = None
    tokens: tuple[int, ...] = ()
    preceding: tuple[int, ...] = ()
    position: int = 0
    sleeps: int = 0
    policy: Policy
    sampling: Sampling
    tokenizer: str | None = None

    def __post_init__(self):
        """Stores integers of any type as Python's, which a file can hold."""
        for name in ("tokens", "preceding"):
            ids = tuple(as_integers(name, getattr(self, name)).tolist())
            object.__setattr__(self, name, ids)
        for name in ("position", "sleeps"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), 0))

    def check(self, config: ModelConfig, *, tokenizer: str | None = None):
        """Whether it can go on.

        Args:
          tokenizer: identity of the one with which it is to go on; None for ids alone.

        Raises:
          ValueError: a state of another config or of several rows, parts that are not of one
            moment of a life, or another tokenizer.
        """
        rows = self.state.window.length_B.shape
        if rows != (1,):
            raise ValueError(f"a snapshot has a state of one row; got length_B of shape {rows}")
        cache.check_state(config, self.state)
        for name, logits_Y in (("logits_Y", self.logits_Y), ("opening_Y", self.opening_Y)):
            if logits_Y is not None and np.shape(logits_Y) != (config.vocab_size,):
                raise ValueError(
                    f"{name} must have shape ({config.vocab_size},); got {np.shape(logits_Y)}"
                )
        self._check_life(config)
        if tokenizer is not None and self.tokenizer not in (None, tokenizer):
            if apart := special_tokens_of(self.tokenizer, tokenizer):
                raise ValueError(
                    f"the snapshot was read with special_tokens={apart[0]!r}, and this tokenizer "
                    f"has {apart[1]!r}; load it with special_tokens={apart[0]}"
                )
            raise ValueError(
                f"the snapshot was read with the tokenizer {self.tokenizer}, and this one is "
                f"{tokenizer}"
            )

    def _check_life(self, config: ModelConfig):
        (filled,) = np.asarray(self.state.window.length_B).tolist()
        if len(self.tokens) != filled:
            raise ValueError(
                f"tokens must be the {filled} ids of the state's window; got {len(self.tokens)}"
            )
        check_vocabulary(config, np.array(self.tokens, np.int64))
        slept_on = self.position - filled
        if not self.sleeps <= slept_on <= self.sleeps * config.window:
            raise ValueError(
                f"position={self.position} and sleeps={self.sleeps} are not of one life: with "
                f"{filled} tokens in the present window, each sleep was on 1 to {config.window}"
            )
        most = min(CONTEXT, slept_on)
        if len(self.preceding) > most:
            raise ValueError(
                f"preceding must be at most {most} ids, of those read before the window; got "
                f"{len(self.preceding)}"
            )
        check_vocabulary(config, np.array(self.preceding, np.int64))


def fingerprint(params) -> str:
    """Equal for two trees of parameters only if all their values are."""
    text = strict_json.dumps(storage.digests(params), sort_keys=True)
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def save(path: pathlib.Path, snapshot: Snapshot, *, config: ModelConfig, params: str):
    """Writes the file, atomically.

    Args:
      params: their `fingerprint`.

    Raises:
      StorageError: it cannot be written; what was there stays.
    """
    record = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "params": params,
        "tokenizer": snapshot.tokenizer,
        "position": snapshot.position,
        "phase": len(snapshot.tokens),
        "preceding": snapshot.preceding,
        "sleeps": snapshot.sleeps,
        "policy": {"name": snapshot.policy.name, **dataclasses.asdict(snapshot.policy)},
        "sampling": dataclasses.asdict(snapshot.sampling),
    }
    tokens_L = np.zeros(config.window, np.int32)
    tokens_L[: len(snapshot.tokens)] = snapshot.tokens
    tree = {
        "state": snapshot.state,
        "logits": snapshot.logits_Y,
        "opening": snapshot.opening_Y,
        "tokens": tokens_L,
    }
    arrays = {name: np.asarray(leaf) for name, leaf in _named(tree)}
    storage.write_arrays(path, record, arrays)


def load(
    path: pathlib.Path, *, config: ModelConfig | None, params: str, tokenizer: str | None
) -> tuple[Snapshot, ModelConfig]:
    """Return the snapshot, and the config that it was saved with or the one that was given.

    Args:
      params: fingerprint of those with which it goes on.
      tokenizer: identity, or None to go on with ids alone.

    Raises:
      StorageError: the file is not there or is damaged, or another config, other parameters or
        another tokenizer were used.
    """
    record, arrays = storage.read_arrays(path)
    if record.get("format") != FORMAT:
        raise StorageError(
            f"{path} is of format {record.get('format')}, and this version reads {FORMAT}"
        )
    config = _config_of(path, record["config"], config)
    if record["params"] != params:
        raise StorageError(
            f"{path} is a snapshot of other parameters: their fingerprint was {record['params']}, "
            f"and is {params}"
        )
    tree = _tree_of(path, config, arrays)
    try:
        snapshot = _snapshot_of(path, record, tree)
        snapshot.check(config, tokenizer=tokenizer)
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from None
    return snapshot, config


def _snapshot_of(path, record: dict[str, Any], tree: dict[str, Any]) -> Snapshot:
    try:
        policy = dict(record["policy"])
        policy = POLICIES[policy.pop("name")](**policy)
        sampling = Sampling(**record["sampling"])
    except (KeyError, TypeError, ConfigError) as error:
        raise StorageError(f"{path}: its record is not one of this version: {error!r}") from None
    return Snapshot(
        state=tree["state"],
        logits_Y=tree["logits"],
        opening_Y=tree["opening"],
        tokens=tuple(tree["tokens"][: record["phase"]].tolist()),
        preceding=tuple(record.get("preceding", ())),  # files of 0.1.0 may lack it
        position=record["position"],
        sleeps=record["sleeps"],
        policy=policy,
        sampling=sampling,
        tokenizer=record["tokenizer"],
    )


def _config_of(path, stored: dict[str, Any], given: ModelConfig | None) -> ModelConfig:
    try:
        saved = ModelConfig(**stored)
    except (ConfigError, TypeError) as error:
        raise StorageError(
            f"{path} was saved by a config that this version lacks: {error}"
        ) from None
    if given is None:
        return saved
    for field in dataclasses.fields(ModelConfig):
        was, now = getattr(saved, field.name), getattr(given, field.name)
        free = field.name in _FREE or field.name.startswith(_FREE_PREFIX)
        if was != now and not free:
            raise StorageError(
                f"{path} is a snapshot with {field.name}={was!r}, and the config has {now!r}"
            )
    return given


def _tree_of(path, config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What was saved, as a tree again; every array has its place, shape and dtype."""
    logits_Y = jax.ShapeDtypeStruct((config.vocab_size,), np.float32)
    like = {
        "state": jax.eval_shape(lambda: cache.init_state(config, 1)),
        "logits": logits_Y if "logits" in arrays else None,
        "opening": logits_Y if "opening" in arrays else None,
        "tokens": jax.ShapeDtypeStruct((config.window,), np.int32),
    }
    expected = dict(_named(like))
    for name in sorted(expected.keys() ^ arrays.keys()):
        state = "is missing" if name in expected else "has no place in its config's state"
        raise StorageError(f"{path}: array {name} {state}")
    for name, leaf in expected.items():
        found = arrays[name]
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise StorageError(
                f"{path}: array {name} must be {leaf.dtype} of shape {leaf.shape}; got "
                f"{found.dtype} of shape {found.shape}"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def _named(tree) -> list[tuple[str, Any]]:
    """Leaves in their order, by names such as state.window.length_B."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
