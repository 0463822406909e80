"""How a context and its questions become windows: one layout for every task."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """One example, or a batch of them with a leading B on every array.

    Nothing is shifted: the logits at a scored position predict the target there.

    Attributes:
      tokens_WL: int32; 0 where padded.
      length_W: int32; the valid tokens of each window, always a prefix of it.
      targets_WL: int32; the answer's token at a scored position, else 0.
      mask_WL: bool; which positions are scored.
      depth_WL: int32; the hops or steps asked at a scored position, or which window of its
        document it lies in, from 1; else 0.
      answer_WL: int32; the question (0, 1, ..) a scored position belongs to, else -1. An answer
        of several tokens has several scored positions.
      reset_W: bool; the windows at which a document begins, from a fresh state; None where an
        example is one piece.
    """

    tokens_WL: np.ndarray
    length_W: np.ndarray
    targets_WL: np.ndarray
    mask_WL: np.ndarray
    depth_WL: np.ndarray
    answer_WL: np.ndarray
    reset_W: np.ndarray | None = None

    def row(self, b: int) -> "Example":
        """One example of a batch."""
        fields: list[Any] = [None if field is None else field[b] for field in self]
        return Example(*fields)


class Question(NamedTuple):
    """What is read of one question, and what must be predicted at the last tokens of it."""

    tokens: Sequence[int]
    targets: Sequence[int]  # of the last len(targets) tokens
    depth: int


class Content(NamedTuple):
    """What stands in one example: the tokens of each context window, and the questions."""

    context: Sequence[Sequence[int]]
    questions: Sequence[Question]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Context windows first, then windows of whole questions; only the latter are scored."""

    window: int
    num_context_windows: int
    num_questions: int  # at most
    question_tokens: int  # at most
    answer_tokens: int  # at most

    @functools.cached_property
    def questions_per_window(self) -> int:
        """As many as always fit, however long they are."""
        return self.window // self.question_tokens

    @functools.cached_property
    def num_windows(self) -> int:
        """Context and question windows together, W."""
        return self.num_context_windows + -(-self.num_questions // self.questions_per_window)

    @functools.cached_property
    def scored_per_window(self) -> tuple[int, ...]:
        """An upper bound of the scored positions of each window; 0 for context windows."""
        starts = range(0, self.num_questions, self.questions_per_window)
        questions = [min(self.questions_per_window, self.num_questions - i) for i in starts]
        return (0,) * self.num_context_windows + tuple(q * self.answer_tokens for q in questions)

    def batch(self, contents: Sequence[Content]) -> Example:
        """Writes the tokens of each context window, and then the questions one by one."""
        # Python lists first, then few numpy calls: many times faster for short windows.
        tokens, lengths, positions, scored = [], [], [], []
        for context, questions in contents:
            windows = [*context, *([] for _ in range(self.num_windows - len(context)))]
            for number, question in enumerate(questions):
                w = self.num_context_windows + number // self.questions_per_window
                windows[w].extend(question.tokens)
                end = len(tokens) + w * self.window + len(windows[w])
                positions.extend(range(end - len(question.targets), end))
                scored.extend((target, question.depth, number) for target in question.targets)
            for window in windows:
                tokens.extend(window)
                tokens.extend([0] * (self.window - len(window)))
                lengths.append(len(window))
        shape = len(contents), self.num_windows, self.window
        flat = np.zeros((3, len(tokens)), np.int32)
        flat[2] = -1
        flat[:, positions] = np.array(scored, np.int32).T
        targets_BWL, depth_BWL, answer_BWL = flat.reshape(3, *shape)
        tokens_BWL = np.array(tokens, np.int32).reshape(shape)
        length_BW = np.array(lengths, np.int32).reshape(shape[:2])
        return Example(tokens_BWL, length_BW, targets_BWL, answer_BWL >= 0, depth_BWL, answer_BWL)


def cut_right_aligned(stream: Sequence[int], window: int, num_windows: int) -> list[Sequence[int]]:
    """Cuts a stream as if it were padded on the left: the last windows are full.

    The padding itself is not part of the windows, so the first ones may be short or empty.
    """
    padding = window * num_windows - len(stream)
    cuts = [max(0, window * w - padding) for w in range(num_windows + 1)]
    return [stream[start:end] for start, end in itertools.pairwise(cuts)]
