"""Flags that say where the files of a run on text are now; their digests prove that it is them."""

import dataclasses
import glob
import os
from collections.abc import Mapping
from typing import Any

from absl import flags

from launch.common import cli
from sleepnet.config import ConfigError
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import TextConfig
from sleepnet.tokenizer import BYTES

_HELP = {
    "tokenizer": "Where the run's tokenizer is now, if it has moved.",
    "train_files": "Where the run's text is now, if it has moved; may be given several times.",
    "test_files": "Likewise, of its held-out text.",
}


def define(*fields: str) -> dict[str, flags.FlagHolder[Any]]:
    """Define flags for some of "tokenizer", "train_files" and "test_files"."""
    return {field: _define(field) for field in fields}


def _define(field: str) -> flags.FlagHolder[Any]:
    if field == "tokenizer":
        return cli.define_path(field, None, _HELP[field])
    parser, serializer = cli.PathParser(), flags.ArgumentSerializer()
    return flags.DEFINE_multi(parser, serializer, field, None, _HELP[field])


def apply(config: ExperimentConfig, given: Mapping[str, flags.FlagHolder[Any]]) -> ExperimentConfig:
    """Return the config of a run with the paths that were given in place of its own.

    Raises:
      ConfigError: files that are not there, and no flag says where; flags for a run without files.
    """
    chosen = {
        field: str(flag.value) if field == "tokenizer" else tuple(map(str, flag.value))
        for field, flag in given.items()
        if flag.value is not None
    }
    task = config.task
    if not isinstance(task, TextConfig):
        for field in chosen:
            raise ConfigError(f"--{field}: the run is on {task.name}, which reads no files")
        return config
    task = dataclasses.replace(task, **chosen)
    for field in given:
        value = getattr(task, field)
        for path in (value,) if field == "tokenizer" else value:
            if path != BYTES and not os.path.lexists(path) and not glob.glob(path):
                raise ConfigError(
                    f"task.{field}: there is no {path}; if it has moved, name its new path with "
                    f"--{field}: a digest proves that it is the same"
                )
    return dataclasses.replace(config, task=task)
