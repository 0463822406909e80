"""What models learn: reasoning over a context that is gone when the question comes, and text."""

from collections.abc import Callable
from typing import Any

from sleepnet.tasks.base import Floor, QuestionTask, Task, TaskConfig
from sleepnet.tasks.depo import Depo, DepoConfig
from sleepnet.tasks.facts import Facts, FactsConfig
from sleepnet.tasks.layout import Example
from sleepnet.tasks.loader import TaskSource, batches, check_batch
from sleepnet.tasks.rule110 import Rule110, Rule110Config
from sleepnet.tasks.text import Text, TextConfig

__all__ = [
    "TASKS",
    "Depo",
    "DepoConfig",
    "Example",
    "Facts",
    "FactsConfig",
    "Floor",
    "QuestionTask",
    "Rule110",
    "Rule110Config",
    "Task",
    "TaskConfig",
    "TaskSource",
    "Text",
    "TextConfig",
    "batches",
    "check_batch",
    "make",
]

# Maps `task.name` to the task's config and to the task itself.
TASKS: dict[str, tuple[type[TaskConfig], Callable[[Any], Task]]] = {
    "depo": (DepoConfig, Depo),
    "rule110": (Rule110Config, Rule110),
    "facts": (FactsConfig, Facts),
    "text": (TextConfig, Text),
}


def make(config: TaskConfig) -> Task:
    """Make the task that a config describes.

    Raises:
      TypeError: not the config of a task.
    """
    made_from = dict(TASKS.values())
    if type(config) not in made_from:
        names = ", ".join(cls.__name__ for cls in made_from)
        raise TypeError(f"no task is made from a {type(config).__name__}; choose from {names}")
    return made_from[type(config)](config)
