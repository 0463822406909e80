"""Accuracy against how long ago a fact was read, far beyond the distances of training too."""

import dataclasses
from collections.abc import Sequence

from sleepnet.config import ConfigError, ExperimentConfig, FactsConfig
from sleepnet.evaluation.accuracy import DepthResult, evaluate
from sleepnet.integers import as_integer

_FEWEST_EXAMPLES = 16
_BATCH_TOKENS = 1 << 18
_BATCH_SCORES = 1 << 26  # of attention, in one batch


def forgetting(
    params, config: ExperimentConfig, distances: Sequence[int], *, tokens: int = 1 << 19
) -> list[DepthResult]:
    """Held-out answers about facts that were all read so many pages ago, distance by distance.

    A model whose window is a page has slept as often since. One whose window is the whole stream
    keeps all of a longer stream, too.

    Args:
      params: from a checkpoint.
      config: of the run; of its evaluation, `examples` are the most that are taken.
      distances: in pages.
      tokens: about so many are read for each distance, in 16 examples or more.

    Raises:
      ConfigError: a run on another task than facts.
    """
    if not isinstance(config.task, FactsConfig):
        raise ConfigError(f"task.name must be 'facts' to be forgotten; got {config.task.name!r}")
    return [
        evaluate(params, at_distance(config, distance, tokens), config.model.passes)[0]
        for distance in distances
    ]


def at_distance(config: ExperimentConfig, distance: int, tokens: int) -> ExperimentConfig:
    """The config whose facts all lie `distance` pages before the questions."""
    task, model = config.task, config.model
    assert isinstance(task, FactsConfig)
    distance, tokens = as_integer("distance", distance, 1), as_integer("tokens", tokens, 1)
    stream = (distance + 1) * task.page
    scores = 0
    if task.window == task.tokens:
        task = dataclasses.replace(task, depths=(distance,), window=stream)
        model = dataclasses.replace(model, window=stream)
        scores = model.num_heads * stream**2
    task = dataclasses.replace(task, depths=(distance,), curriculum=0)
    examples = min(config.evaluation.examples, max(_FEWEST_EXAMPLES, tokens // stream))
    fitting = min(_BATCH_TOKENS // stream, _BATCH_SCORES // scores if scores else examples)
    batch_size = min(examples, max(1, fitting))
    evaluation = dataclasses.replace(config.evaluation, examples=examples, batch_size=batch_size)
    return dataclasses.replace(config, task=task, model=model, evaluation=evaluation)
