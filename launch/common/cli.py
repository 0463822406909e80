"""What every program shares: the config flag, and errors as one clear line."""

import dataclasses
import functools
import glob
import io
import itertools
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from launch.common import busy
from launch.common.live_line import is_read, notify, tell
from sleepnet import tasks
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.config.checks import local_path, nearest
from sleepnet.config.model import check_trainable
from sleepnet.experiment import ExperimentConfig, field_paths, fields_at, from_dict
from sleepnet.input_files import regular_status
from sleepnet.storage import StorageError
from sleepnet.tasks import TaskConfig

flags.disclaim_key_flags()  # flags defined here belong to the program, whose --help shows them
USER_ERRORS = (ConfigError, StorageError)
USER_ERROR = 2  # their exit code
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the exit code of what may go well at another time


def run(main: Callable[[list[str]], int | None], *, takes_words: bool = False):
    """`app.run`, with bad flags and expected errors answered in a line, and exit code 2.

    A character that an output's encoding lacks is escaped. When nobody reads standard output any
    more, as after `| head`, the program ends without a word, with exit code 128 + SIGPIPE.

    Args:
      takes_words: whether the program takes arguments that are not flags.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every file it opens
    _escape_what_cannot_be_encoded()
    try:
        try:
            app.run(main, flags_parser=functools.partial(_parse, takes_words=takes_words))
        except SystemExit:  # the usual end
            _flush()
            raise
    except BrokenPipeError:
        if is_read(sys.stdout) and is_read(sys.stderr):
            raise  # it was another pipe
        tell(sys.stdout, "")  # Python has nothing left to write at its end
        sys.exit(128 + signal.SIGPIPE)
    except (*USER_ERRORS, RuntimeError) as error:
        if (code := complain_of(error)) is None:
            raise
        sys.exit(code)


def complain(error: object, code: int = USER_ERROR) -> int:
    """Says what is wrong in a line; the exit code."""
    notify(sys.stderr, f"error: {error}")
    return code


def complain_of(error: BaseException) -> int | None:
    """Report an error that a person can mend; return its exit code, or None for any other error."""
    if isinstance(error, USER_ERRORS):
        return complain(error)
    if advice := busy.advice(error):
        return complain(advice, TRY_AGAIN)
    return None


def _escape_what_cannot_be_encoded():
    """Print é as \\xe9 where the locale is ASCII, say, instead of ending with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _flush():
    """Write what is left to standard output while errors can still be reported.

    Raises:
      BrokenPipeError: nobody reads it.
      StorageError: it cannot be written for another reason.
    """
    try:
        read = sys.stdout is None or tell(sys.stdout, "")
    except OSError as error:
        raise StorageError(f"cannot write to standard output: {error.strerror}") from None
    if not read:
        raise BrokenPipeError


def define_config():
    """Defines --config=experiments/NAME.py with --config.section.field=value overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "Experiment file, such as experiments/depo_small.py."
    )


class PathParser(flags.ArgumentParser):
    """Parses a path: expands ~ and refuses URLs."""

    def parse(self, argument: str | pathlib.Path) -> pathlib.Path:
        return pathlib.Path(local_path(str(argument)))


def define_path(name: str, default: str | None, help: str, *, required: bool = False):
    """Define a flag that names a file or folder, whose value is a `pathlib.Path`."""
    return flags.DEFINE(PathParser(), name, default, help, required=required)


def define_paths(name: str, help: str):
    """Define a required flag that may be given several times, a `pathlib.Path` each time."""
    serializer = flags.ArgumentSerializer()
    return flags.DEFINE_multi(PathParser(), serializer, name, None, help, required=True)


def experiment_config(values: ml_collections.ConfigDict) -> ExperimentConfig:
    """The frozen, validated config; vocabulary and window follow the task where not given."""
    made = tasks.make(task_config(values))
    _check_splits(made)
    config = from_dict(_with_model(values.to_dict(), vocab_size=made.vocab_size))
    check_trainable(config.model)
    config = dataclasses.replace(config, task=made.config)
    if config.model.vocab_size < made.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the task has "
            f"{made.vocab_size} tokens; leave it out, and it follows the task"
        )
    return config


def task_config(values: ml_collections.ConfigDict) -> TaskConfig:
    """The task of an experiment, validated; no file is opened for it."""
    return from_dict(_with_model(values.to_dict(), vocab_size=1)).task


def _check_splits(task):
    """A task too small to fill both splits is found here, not after training."""
    for split in ("train", "test"):
        try:
            task.example(split, 0)
        except ValueError as error:
            raise ConfigError(f"task: {error}") from None


def flags_in(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of the flags of a command, --name=value or --name value; None: no value."""
    for argument, following in itertools.pairwise((*arguments, "-")):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            yield name, value if equals else None if following.startswith("-") else following


def as_flags(given: Iterable[tuple[str, str | None]]) -> list[str]:
    """What `flags_in` read, as arguments again."""
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in given]


def is_config(name: str) -> bool:
    """Whether a flag is --config or one of its overrides."""
    return name == "config" or name.startswith("config.")


def reads_none(path: str) -> bool:
    """Whether "None" for this "section.field" is no value, rather than a text."""
    kinds = {field.type for field in fields_at(path)}
    return bool(kinds) and str not in kinds


def has_backend(model: ModelConfig) -> bool:
    """Whether this machine's devices take the kernels that were chosen."""
    import jax

    return model.backend != "pallas" or jax.default_backend() == "tpu"


def check_backend(model: ModelConfig):
    """Raises ConfigError for a kernel that is not for this machine's devices."""
    if not has_backend(model):
        import jax

        platform = jax.default_backend()
        raise ConfigError(
            f"model.backend='pallas' is a kernel for TPU, and this machine's devices are "
            f"{platform}; allowed here: xla"
        )


def _with_model(sections: dict, vocab_size: int) -> dict:
    model = dict(sections["model"])
    for field, value in (("vocab_size", vocab_size), ("window", sections["task"]["window"])):
        if model.get(field) is None:
            model[field] = value
    return sections | {"model": model}


def _parse(argv, takes_words: bool):
    """absl's parser; what it or a config file raises becomes a ConfigError."""
    argv = with_config_path(argv)
    arguments, empty = _without_nones(argv)
    try:
        program, *words = flags.FLAGS(arguments)
        _empty(empty)
        if words and not takes_words:
            raise ConfigError(
                f"{words[0]!r} is not a flag: flags begin with --; put a value with spaces in "
                f"quotes, as in --prompt='two words'"
            )
        return [program, *words]
    except SystemExit:  # of --help, which has done what was asked; absl calls it a failure
        sys.exit(0)
    except flags.Error as error:
        raise ConfigError(_ask_for_missing(error) or str(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_explain(argv, error)) from None


def _without_nones(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take out overrides by None, which the parsers of no type read.

    Returns:
      The other arguments, and the "config.section.field" whose last override is None.
    """
    others, last, at = [], {}, 0
    while at < len(argv) and argv[at] != "--":
        name, equals, value = argv[at].lstrip("-").partition("=")
        value = value if equals else "".join(argv[at + 1 : at + 2])
        given = argv[at].startswith("-") and name.startswith("config.")
        if given and reads_none(name.removeprefix("config.")):
            last[name] = value
            if value == "None":
                at += 1 if equals else 2
                continue
        others.append(argv[at])
        at += 1
    return [*others, *argv[at:]], [name for name, value in last.items() if value == "None"]


def _empty(names: Sequence[str]):
    """Set fields of --config to None; whether they may be is checked with all other values."""
    for name in names:
        values = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if values is None:
            raise flags.UnrecognizedFlagError(name)
        _, section, field = name.split(".")
        values[section][field] = None


def _ask_for_missing(error: flags.Error) -> str | None:
    """What absl says of required flags that were not given, in our words."""
    missing = re.findall(r"Flag --(\w+) must have a value other than None", str(error))
    if isinstance(error, flags.UnrecognizedFlagError) and is_config(error.flagname):
        missing = ["config"] if "config" in flags.FLAGS else []  # which defines its overrides
    helps = [flags.FLAGS[name].help.splitlines()[0].rstrip(".;") for name in missing]
    asked = [f"--{name}=... ({about})" for name, about in zip(missing, helps, strict=True)]
    return f"give {' and '.join(asked)}" if asked else None


def with_config_path(argv: Sequence[str]) -> list[str]:
    """Expand ~ in --config, which must name a file.

    config_flags reports a missing file only after a traceback of its own. What follows -- belongs
    to another program: it is checked, and left as it is.
    """
    argv, ours = list(argv), True
    for i, argument in enumerate(argv):
        ours &= argument != "--"
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        place = i if equals else i + 1
        given = value if equals else "".join(argv[place : place + 1])
        path = _config_path(given)
        if ours and place < len(argv):
            argv[place] = f"{flag}={path}" if equals else path
    return argv


def _config_path(given: str) -> str:
    """Expand ~ in PATH or PATH:ARGUMENT; raises ConfigError for a file that cannot be read."""
    try:
        given = local_path(given)
    except ConfigError as error:
        raise ConfigError(f"--config={given}: {error}") from None
    path = pathlib.Path(given.split(":")[0])
    try:
        _read(path)
    except OSError as error:
        folder = path if os.path.isdir(path) else path.parent
        files = [folder / name for name in glob.glob("*.py", root_dir=folder)]
        known = sorted(map(str, filter(_is_experiment, files))) or ["experiments/depo_small.py"]
        raise ConfigError(
            f"--config={path} cannot be read ({error.strerror}); there are: {', '.join(known)}; "
            f"the nearest is {nearest(path, known)}"
        ) from None
    return given


def _is_experiment(path: pathlib.Path) -> bool:
    """Whether it is a file that can be read and defines a config."""
    try:
        return b"def get_config" in _read(path)
    except OSError:
        return False


def _read(path: pathlib.Path) -> bytes:
    """Read a regular file; raises OSError for anything else."""
    regular_status(path)
    return path.read_bytes()


def _explain(argv, error) -> str:
    """Which override failed, with the nearest field that the experiment has."""
    paths = [f"config.{path}" for path in _fields_of_experiment(argv) or field_paths()]
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config.") and name not in paths:
            return f"--{name}: no such field; the nearest is --{nearest(name, paths)}"
    return f"--config: {error!r}" if isinstance(error, KeyError) else str(error)


def _fields_of_experiment(argv) -> list[str]:
    """Return each "section.field" in the file of --config; none where it cannot be loaded."""
    try:
        path = dict(flags_in(argv))["config"] or ""
        values: Any = flags.FLAGS["config"].parser.parse(path)
        return [f"{section}.{field}" for section in values for field in values[section]]
    except Exception:  # of code that is not ours: it has no --config, or the file raises
        return []
