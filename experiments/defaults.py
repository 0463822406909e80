"""The ConfigDict that experiments fill in: every field of every section, at its default.

A field that stands here can be overridden on the command line, with its type checked:
--config.model.passes=4.
"""

import dataclasses
import typing

import ml_collections
from ml_collections import config_dict

from sleepnet.config import ConfigError, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.config.checks import choices
from sleepnet.tasks import TASKS


def experiment(
    *,
    task: dict,
    model: dict,
    training: dict,
    mesh: dict | None = None,
    evaluation: dict | None = None,
):
    """The config of one experiment; what is not given keeps its default.

    model.vocab_size and model.window may be left out: they follow the task.
    """
    if task.get("name") not in TASKS:
        raise ConfigError(choices("task.name", task.get("name"), TASKS))
    sections = {
        "task": (TASKS[task["name"]][0], task),
        "model": (ModelConfig, model),
        "training": (TrainingConfig, training),
        "mesh": (MeshConfig, mesh or {}),
        "evaluation": (EvaluationConfig, evaluation or {}),
    }
    return ml_collections.ConfigDict(
        {name: _section(cls, values) for name, (cls, values) in sections.items()}
    )


def _section(cls: type, values: dict) -> dict:
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise ConfigError(choices(f"{cls.__name__}.{name}", name, names, what="no such field"))
    fields = {}
    for field in dataclasses.fields(cls):
        follows_task = cls is ModelConfig and field.name in ("vocab_size", "window")
        default = None if follows_task else field.default
        value = values.get(field.name, default)
        fields[field.name] = _optional(value, field.type) if default is None else value
    return fields


def _optional(value, annotation):
    """A field that may be None at any time, and otherwise takes only its type."""
    kind = typing.get_origin(annotation) or annotation
    fits = value is None or isinstance(value, kind)
    return config_dict.FieldReference(value, field_type=kind) if fits else value
