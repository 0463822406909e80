"""Accuracy on held-out examples, by the depth of the question and for any N."""

import dataclasses

import jax
import numpy as np

from sleepnet import tasks
from sleepnet.config import ConfigError
from sleepnet.evaluation import scoring
from sleepnet.evaluation.intervals import wilson
from sleepnet.experiment import ExperimentConfig
from sleepnet.integers import as_integer
from sleepnet.tasks import QuestionTask
from sleepnet.training.step import score

# One program for each N and size of batch, also for streaming's comparison.
compiled_score = jax.jit(score, static_argnames=("model", "window_passes", "scored_per_window"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthResult:
    """How well questions of one depth were answered. Shares lie in [0, 1].

    The intervals are 95% Wilson intervals with n = `examples`, not `answers`: answers to one
    example share a context and stand or fall together, so counting them as independent would
    claim too much. They are as wide as if one example were one trial, and say nothing about
    other seeds of training.

    Attributes:
      passes: N of the sleeps.
      depth: hops or steps; None is all depths together.
      examples: those that ask this depth.
      answers: those of this depth.
      accuracy: the share of answers all of whose tokens are right, with its interval.
      exact: the share of examples all of whose answers of this depth are right, with its interval.
      floor: the accuracy of the best answer that never reads the context; over all depths, the
        mean of theirs by answer.
      exact_floor: the same of `exact`; None over several depths, of which no task knows it.
    """

    passes: int
    depth: int | None
    examples: int
    answers: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    exact: float
    exact_low: float
    exact_high: float
    floor: float
    exact_floor: float | None


def evaluate(
    params, config: ExperimentConfig, passes: int, *, split: str = "test"
) -> list[DepthResult]:
    """Scores `config.evaluation.examples` examples of `split`, sleeping with N = `passes`.

    Args:
      params: from `init_params` or a checkpoint.
      config: of the run.
      passes: N of every window that bears no loss; also one other than the trained.
      split: "test", or "train". Floors are those of the test split in any case.

    Returns:
      One result for each of the task's test depths, and last one for all of them together.

    Raises:
      ConfigError: no example asks one of the depths; more examples are needed.
      ValueError: an unknown split, or a task without questions.
    """
    passes = as_integer("passes", passes, 1)
    task = tasks.make(config.task)
    if not isinstance(task, QuestionTask):
        raise ValueError(f"only questions have answers by depth; got {config.task.name}")
    answers = _all_answers(params, config, task, passes, split)
    by_depth = []
    for depth in task.depths:
        counts = scoring.count(answers.where(answers.depth_Q == depth))
        if not counts.examples:
            raise ConfigError(
                f"evaluation.examples: none of {config.evaluation.examples} {split} examples asks "
                f"{depth} {task.depth_name}; take more"
            )
        by_depth.append(_result(passes, depth, counts, *task.floor(depth)))
    everything = scoring.count(answers.where(np.isin(answers.depth_Q, task.depths)))
    return [*by_depth, _result(passes, None, everything, *_floor_of_all(by_depth))]


def _all_answers(params, config, task: QuestionTask, passes, split):
    """Batches all have one size, and so one program; the last is cut to the examples wanted."""
    wanted = task.num_distinct(split, config.evaluation.examples)
    batch_size = min(config.evaluation.batch_size, wanted)
    batches = tasks.batches(task, split, batch_size, num_batches=-(-wanted // batch_size))
    parts = []
    for number, batch in enumerate(batches):
        seen = compiled_score(
            params, batch, model=config.model, window_passes=task.window_passes(passes),
            scored_per_window=task.scored_per_window,
        )  # fmt: skip
        parts.append(scoring.score_answers(seen.prediction_BWL, batch, number * batch_size))
    answers = scoring.concatenate(parts)
    return answers.where(answers.example_Q < wanted)


def _result(passes, depth, counts: scoring.Counts, floor, exact_floor) -> DepthResult:
    accuracy = wilson(counts.right / counts.answers, counts.examples)
    exact = wilson(counts.exact / counts.examples, counts.examples)
    return DepthResult(
        passes=passes,
        depth=depth,
        examples=counts.examples,
        answers=counts.answers,
        accuracy=accuracy.mean,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        exact=exact.mean,
        exact_low=exact.low,
        exact_high=exact.high,
        floor=floor,
        exact_floor=exact_floor,
    )


def _floor_of_all(by_depth: list[DepthResult]) -> tuple[float, float | None]:
    answers = [result.answers for result in by_depth]
    answer = float(np.average([result.floor for result in by_depth], weights=answers))
    return answer, by_depth[0].exact_floor if len(by_depth) == 1 else None
