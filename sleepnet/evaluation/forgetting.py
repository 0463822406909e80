"""Accuracy against how long ago a fact was read, far beyond the distances of training too."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.evaluation import record
from sleepnet.evaluation.accuracy import DepthResult, evaluate
from sleepnet.experiment import ExperimentConfig
from sleepnet.integers import as_integer
from sleepnet.tasks import FactsConfig

FILE = "forgetting.json"
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


def forgetting_of_run(
    workdir: pathlib.Path,
    params,
    config: ExperimentConfig,
    step: int,
    distances: Sequence[int],
    *,
    again: bool = False,
    on_notice: Callable[[str], None] = lambda _: None,
) -> dict[int, dict]:
    """Return `forgetting` by distance, from workdir/forgetting.json as far as it goes.

    Only what was measured on these parameters of this run counts, with as many examples; what is
    measured now is stored, distance by distance.

    Args:
      step: of training, to which `params` belong.
      again: measure all of it anew.
      on_notice: told what is measured next.

    Raises:
      StorageError: the file cannot be read or written.
    """
    path = pathlib.Path(workdir) / FILE
    request = {"step": step, "examples": config.evaluation.examples}
    stored = {**request, "measured": record.identity(params, config), "results": {}}
    if not again and storage.exists(path):
        found = storage.read_json(path)
        same = found.items() >= request.items() and "measured" in found
        if same and record.is_of(found["measured"], params, config):
            stored = found
    for distance in distances:
        if str(distance) not in stored["results"]:
            on_notice(f"{distance} pages back")
            (result,) = forgetting(params, config, (distance,))
            stored["results"][str(distance)] = dataclasses.asdict(result)
            storage.write_json(path, stored)
    return {distance: stored["results"][str(distance)] for distance in distances}


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
