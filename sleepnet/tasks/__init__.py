"""What models learn: reasoning over a context that is gone when the question comes, and text."""

from sleepnet.config import DepoConfig, FactsConfig, Rule110Config, TaskConfig, TextConfig
from sleepnet.tasks.base import Floor, QuestionTask, Task
from sleepnet.tasks.depo import Depo
from sleepnet.tasks.facts import Facts
from sleepnet.tasks.layout import Example
from sleepnet.tasks.loader import TaskSource, batches, check_batch
from sleepnet.tasks.rule110 import Rule110
from sleepnet.tasks.text import Text

__all__ = [
    "Depo",
    "Example",
    "Facts",
    "Floor",
    "QuestionTask",
    "Rule110",
    "Task",
    "TaskSource",
    "Text",
    "batches",
    "check_batch",
    "make",
]

_TASKS = {DepoConfig: Depo, Rule110Config: Rule110, FactsConfig: Facts, TextConfig: Text}


def make(config: TaskConfig) -> Task:
    """The task that a config describes.

    Raises:
      TypeError: not the config of a task.
    """
    if type(config) not in _TASKS:
        names = ", ".join(cls.__name__ for cls in _TASKS)
        raise TypeError(f"no task is made from a {type(config).__name__}; choose from {names}")
    return _TASKS[type(config)](config)
