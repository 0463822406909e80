"""From predicted tokens to right answers: plain numpy, no model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sleepnet.tasks import Example


class Answers(NamedTuple):
    """What became of Q answers.

    Attributes:
      example_Q: int, the number of the example that asked.
      depth_Q: int, the hops or steps asked.
      right_Q: bool, all tokens of the answer are right.
    """

    example_Q: np.ndarray
    depth_Q: np.ndarray
    right_Q: np.ndarray

    def where(self, chosen_Q: np.ndarray) -> "Answers":
        """The answers where chosen_Q (bool)."""
        return Answers(*(array[chosen_Q] for array in self))


class Counts(NamedTuple):
    """How many examples and answers there were, and how many were right.

    Attributes:
      examples: those with at least one of the answers.
      answers: of these examples.
      right: right answers.
      exact: examples all of whose answers are right.
    """

    examples: int
    answers: int
    right: int
    exact: int


def score_answers(prediction_BWL, batch: Example, first_example: int = 0) -> Answers:
    """Joins scored positions into answers; an answer is right if each of its tokens is.

    Args:
      prediction_BWL: int, the predicted token at each scored position of `batch`.
      batch: with a leading axis B.
      first_example: the number of the first example of the batch.
    """
    prediction_BWL = np.asarray(prediction_BWL)
    scored = batch.mask_WL
    row_S = np.nonzero(scored)[0]
    wrong_S = (prediction_BWL != batch.targets_WL)[scored]
    # Answers are numbered per row: a row's number makes the pair unique.
    pair_S = row_S * (batch.answer_WL.max(initial=0) + 1) + batch.answer_WL[scored]
    _, first_Q, answer_S = np.unique(pair_S, return_index=True, return_inverse=True)
    wrong_Q = np.bincount(answer_S, weights=wrong_S, minlength=len(first_Q))
    return Answers(first_example + row_S[first_Q], batch.depth_WL[scored][first_Q], wrong_Q == 0)


def concatenate(parts: Sequence[Answers]) -> Answers:
    """One Answers of many; needs one or more."""
    return Answers(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def count(answers: Answers) -> Counts:
    """Counts by answer and by example."""
    asked = np.bincount(answers.example_Q)
    right = np.bincount(answers.example_Q, weights=answers.right_Q)
    return Counts(
        examples=int(np.sum(asked > 0)),
        answers=len(answers.right_Q),
        right=int(np.sum(answers.right_Q)),
        exact=int(np.sum((asked > 0) & (asked == right))),
    )
