"""Evaluation of models whose score is known without running them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleepnet import tasks
from sleepnet.config import ConfigError
from sleepnet.evaluation import accuracy
from sleepnet.evaluation.accuracy import evaluate


def test_a_constant_answer_scores_as_counted_from_the_examples(config, params):
    """All-zero parameters give equal logits and so always the first token."""
    silent = jax.tree.map(jnp.zeros_like, params)
    *by_depth, overall = evaluate(silent, config, passes=1)
    task = tasks.make(config.task)
    examples = [task.example("test", i) for i in range(config.evaluation.examples)]
    for result in by_depth:
        asked = [
            target
            for example in examples
            for target in example.targets_WL[example.depth_WL == result.depth].tolist()
        ]
        assert result.answers == len(asked)
        assert result.accuracy == pytest.approx(asked.count(0) / len(asked))
        assert result.examples == sum(result.depth in example.depth_WL for example in examples)
        assert result.accuracy_low <= result.floor <= result.accuracy_high
    assert (overall.depth, overall.examples) == (None, 120)
    assert overall.answers == sum(result.answers for result in by_depth) == 3 * 120
    assert overall.floor == pytest.approx(1 / 7)


def test_an_untrained_model_does_not_beat_the_floor(config, params):
    for result in evaluate(params, config, passes=config.model.passes):
        assert result.passes == config.model.passes
        assert result.accuracy_low <= result.floor


@pytest.fixture
def oracle(monkeypatch):
    """In place of the model: every prediction is right."""
    monkeypatch.setattr(accuracy, "compiled_score", lambda _, batch, **__: Oracle(batch.targets_WL))


class Oracle(NamedTuple):
    prediction_BWL: np.ndarray


def test_right_answers_score_one(config, oracle):
    for result in evaluate(None, config, passes=1):
        assert (result.accuracy, result.exact) == (1.0, 1.0)
        assert result.accuracy_low < 1.0 == result.accuracy_high


def test_too_few_examples_for_a_depth_is_said(config, oracle):
    one = dataclasses.replace(config.evaluation, examples=1)
    task = dataclasses.replace(config.task, queries=1)
    with pytest.raises(ConfigError, match=r"none of 1 test examples asks \d hops"):
        evaluate(None, dataclasses.replace(config, evaluation=one, task=task), passes=1)
