"""The folder of a run: whose it is, what it may be asked to go on with, what it has learned."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from sleepnet import storage, strict_json
from sleepnet.experiment import ExperimentConfig, from_dict
from sleepnet.nn.model import init_params
from sleepnet.tasks.text import contents
from sleepnet.tokenizer import special_tokens_of
from sleepnet.training import run_io, throughput
from sleepnet.training.checkpoint import Checkpoints

CONFIG, STARTS, PROFILE, LOCK = "config.json", "starts.jsonl", "profile", ".lock"
_FINGERPRINTS = ("task", "fingerprints")
# What a run may change when it goes on: nothing that the losses of its good steps depend on but
# for rounding.
FREE_SECTIONS = ("mesh", "evaluation")
FREE_FIELDS = (
    ("model", "backend"),
    # Files may move: their content, and the tokens that it becomes, stand in the fingerprints.
    *(("task", field) for field in ("train_files", "test_files", "tokenizer", "special_tokens")),
    *(
        ("training", field)
        for field in (
            "checkpoint_every", "checkpoints_kept", "evaluate_every", "evaluate_examples",
            "best_kept", "on_bad_step", "spike_factor", "skips_in_a_row", "rollback_steps",
            "rollbacks", "on_save_error", "stall_seconds", "stall_stops",
        )
    ),
)  # fmt: skip


# What a run that begins would take for its own.
_TAKEN_OVER = (run_io.ROLLBACKS, throughput.CLOCK)


def fixed_fields(config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Return the sections without the fields that a run may change when it goes on."""
    sections = config.to_dict()
    for section in FREE_SECTIONS:
        del sections[section]
    for section, field in FREE_FIELDS:
        sections[section].pop(field, None)  # of tasks that have it
    return sections


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
    """Makes the folder and keeps it for this process, while the block runs or until it dies.

    Raises:
      StorageError: another process has it. Where files cannot be locked, nobody is kept out.
    """
    storage.prepare_folder(workdir)
    with (pathlib.Path(workdir) / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise storage.StorageError(
                f"{workdir} is in use by another run (its heartbeats/0.json tells how far it is): "
                f"wait for its end or stop it, or take another --workdir"
            ) from None
        except OSError:
            pass
        yield


def claim_workdir(config: ExperimentConfig, workdir: pathlib.Path):
    """Writes config.json into a new workdir, or raises StorageError if it holds another run."""
    workdir = pathlib.Path(workdir)
    storage.prepare_folder(workdir)
    if storage.exists(workdir / CONFIG):
        stored = load_config(workdir).to_dict()
        for path, was, now in differences(stored, config.to_dict()):
            back = "put its files back" if path == ".".join(_FINGERPRINTS) else f"set {path} back"
            raise storage.StorageError(
                f"{workdir} holds a run with {path}={was!r}, and this one has {now!r}: "
                f"take another --workdir, or {back}"
            )
    elif left := _left_behind(workdir):
        raise storage.StorageError(
            f"{workdir} holds {left} but no {CONFIG} to tell of which run: "
            f"put it back, or take another --workdir"
        )
    storage.write_json(workdir / CONFIG, config.to_dict())


def _left_behind(workdir: pathlib.Path) -> str | None:
    """What a run has left here that another would go on with."""
    if Checkpoints.exist(workdir):
        return "checkpoints"
    return next((name for name in _TAKEN_OVER if storage.exists(workdir / name)), None)


def load_config(workdir: pathlib.Path) -> ExperimentConfig:
    """Return the config with which a workdir was trained.

    Raises:
      StorageError: it has none, or none that can be read.
    """
    path = pathlib.Path(workdir) / CONFIG
    if not storage.exists(path):
        raise storage.StorageError(f"{workdir} is no workdir of a run: it has no {CONFIG}")
    values = storage.read_json(path)
    task = values.get("task") if isinstance(values, dict) else None
    if isinstance(task, dict) and task.get("name") == "text":
        task.setdefault("special_tokens", "control")  # what was done before there was a choice
    return from_dict(strict_json.as_strings(values))  # a text_field may be called NaN


def load_params(workdir: pathlib.Path, step: int | None = None) -> tuple[Any, int]:
    """Trained parameters of a workdir and their step, the last one by default."""
    config = load_config(workdir)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise storage.StorageError(f"{workdir} has no checkpoint yet: train it first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise storage.StorageError(
                f"{workdir} has no checkpoint of step {step}; it has {steps}"
            )
        like = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
        return checkpoints.restore_params(like, step), step


def differences(stored: dict, wanted: dict) -> Iterator[tuple[str, Any, Any]]:
    """(SECTION.FIELD, stored value, wanted value) of all that a run may not change when it goes on.

    Args:
      stored, wanted: `ExperimentConfig.to_dict()` of the run and of who would go on with it.
    """
    for section, fields in wanted.items():
        if section in FREE_SECTIONS:
            continue
        for field in sorted(fields.keys() | stored[section].keys()):
            was, now = stored[section].get(field), fields.get(field)
            if (section, field) == _FINGERPRINTS:
                was, now = _other_content(was, now)
            if was != now and (section, field) not in FREE_FIELDS:
                was, now = _apart(was, now)
                if (section, field) == _FINGERPRINTS and (apart := _special_tokens(was, now)):
                    yield "task.special_tokens", *apart
                else:
                    yield f"{section}.{field}", was, now


def _other_content(was, now):
    """Fingerprints without those that tell of the same content, under whatever name."""
    if None in (was, now) or len(was) != len(now):
        return was, now
    pairs = [(a, b) for a, b in zip(was, now, strict=True) if contents([a]) != contents([b])]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def _special_tokens(was, now) -> tuple[str, str] | None:
    """How two fingerprints say that special tokens are read, if that is all that differs."""
    if not (isinstance(was, str) and isinstance(now, str)):
        return None
    return special_tokens_of(*contents([was, now]))


def _apart(was, now):
    """Of two tuples as long as each other, the first elements that differ."""
    if isinstance(was, tuple) and isinstance(now, tuple) and len(was) == len(now):
        return next((a, b) for a, b in zip(was, now, strict=True) if a != b)
    return was, now
