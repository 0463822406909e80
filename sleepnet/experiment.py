"""One run as a whole: the model, its task, training, mesh and evaluation, checked to fit."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from sleepnet.config import ConfigError, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.config.checks import choices
from sleepnet.tasks import TASKS, TaskConfig


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
    "task": tuple(config for config, _ in TASKS.values()),
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
        task=_build("task", TASKS[name][0], task),  # whose window the model's follows
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


def _known(prefix: str, values: Iterable[str], allowed: Iterable[str]):
    for key in values:
        if key not in allowed:
            raise ConfigError(choices(f"{prefix}{key}", key, allowed, what="no such field"))
