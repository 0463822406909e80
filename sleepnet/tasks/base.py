"""What every task offers to training and evaluation."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from sleepnet.integers import as_integer
from sleepnet.tasks.layout import Content, Example, Layout
from sleepnet.tasks.splits import as_index, check_split


class TaskConfig(Protocol):
    """What the config of every task has."""

    @property
    def name(self) -> str:
        """The key of `sleepnet.tasks.TASKS`."""
        ...

    @property
    def window(self) -> int:
        """Tokens of each window, L."""
        ...

    @property
    def seed(self) -> int:
        """Of all examples."""
        ...


class Floor(NamedTuple):
    """The accuracy of the best answer that never reads the context.

    Attributes:
      answer: the probability that one answer is right.
      exact: the probability that all answers of one depth in an example are right; None where
        the answers of an example depend on each other in a way that was not counted out.
    """

    answer: float
    exact: float | None


class Task(abc.ABC):
    """Examples by number, each an independent function of (config.seed, split, index)."""

    depth_name: str  # what depth counts, for people: "hops", "steps" or "windows"
    config: TaskConfig

    def __init__(self, config: TaskConfig, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size

    @property
    def window(self) -> int:
        """Tokens of each window, L."""
        return self.config.window

    @property
    @abc.abstractmethod
    def num_windows(self) -> int:
        """Windows of each example, W."""

    @property
    @abc.abstractmethod
    def scored_per_window(self) -> tuple[int, ...]:
        """A static upper bound of the scored positions of each window."""

    @abc.abstractmethod
    def window_passes(self, passes: int) -> tuple[int, ...]:
        """The passes of each window: `passes` where the model sleeps, 1 where it does not."""

    @property
    @abc.abstractmethod
    def depths(self) -> tuple[int, ...]:
        """The depths by which the test split is measured."""

    @abc.abstractmethod
    def example(self, split: str, index: int) -> Example:
        """Example `index` of `split`, with arrays of shape (W,) and (W, L).

        Raises:
          ValueError: an unknown split, a negative index, or a split too small to hold anything.
        """

    def num_distinct(self, split: str, wanted: int) -> int:
        """Return how many of the first `wanted` examples can be measured, each counted once.

        All of them, for tasks that draw each example anew; a split of stored data ends.
        """
        check_split(split)
        return wanted

    def examples(self, split: str, indices: Sequence[int]) -> Example:
        """Some examples as a batch, with a leading B on every array."""
        fields = zip(*(self.example(split, index) for index in indices), strict=True)
        stacked: list[Any] = [None if rows[0] is None else np.array(rows) for rows in fields]
        return Example(*stacked)

    @abc.abstractmethod
    def token_name(self, token: int) -> str:
        """How to show a token to people.

        Raises:
          ValueError: a token outside the vocabulary.
        """

    def _check_token(self, token: int):
        as_integer("token", token, 0, self.vocab_size - 1)


class QuestionTask(Task):
    """Questions of some depth about a context that is gone when they come."""

    def __init__(self, config: TaskConfig, layout: Layout, vocab_size: int):
        super().__init__(config, vocab_size)
        self.layout = layout

    @property
    def num_windows(self) -> int:
        """See `Task.num_windows`."""
        return self.layout.num_windows

    @property
    def num_context_windows(self) -> int:
        """How many windows come first that bear no loss."""
        return self.layout.num_context_windows

    @property
    def scored_per_window(self) -> tuple[int, ...]:
        """See `Task.scored_per_window`; 0 for context windows."""
        return self.layout.scored_per_window

    def window_passes(self, passes: int) -> tuple[int, ...]:
        """The model sleeps on the context; where loss is read, it does not."""
        passes = as_integer("passes", passes, 1)
        questions = self.num_windows - self.num_context_windows
        return (passes,) * self.num_context_windows + (1,) * questions

    def example(self, split: str, index: int) -> Example:
        """See `Task.example`."""
        return self.examples(split, [index]).row(0)

    def examples(self, split: str, indices: Sequence[int]) -> Example:
        """See `Task.examples`."""
        return self.layout.batch([self._content(split, as_index(index)) for index in indices])

    @abc.abstractmethod
    def _content(self, split: str, index: int) -> Content:
        """What stands in example `index` of `split`."""

    @abc.abstractmethod
    def floor(self, depth: int) -> Floor:
        """What guessing scores on the test split.

        Raises:
          ValueError: a depth that test does not ask.
        """

    def _check_depth(self, depth: int):
        if depth not in self.depths:
            raise ValueError(
                f"the test split asks no question of {depth} {self.depth_name}; "
                f"choose from {self.depths}"
            )
