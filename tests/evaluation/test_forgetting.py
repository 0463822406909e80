"""What is asked when it is asked how long a fact is remembered."""

import dataclasses

import jax
import numpy as np
import pytest

import sleepnet
from sleepnet import tasks
from sleepnet.config import ConfigError, EvaluationConfig, ModelConfig, TrainingConfig
from sleepnet.evaluation import forgetting as module
from sleepnet.evaluation.forgetting import at_distance, forgetting
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig, FactsConfig

TASK = FactsConfig(depths=(1, 2), keys=4, values=4, noise=2, facts=2, window=4, curriculum=9)
MODEL = ModelConfig(vocab_size=11, pattern="AG", d_model=8, num_heads=2, window=4, passes=1)
CONFIG = ExperimentConfig(model=MODEL, task=TASK, evaluation=EvaluationConfig(examples=20))
WHOLE = dataclasses.replace(
    CONFIG,
    task=dataclasses.replace(TASK, window=12, page=4),
    model=dataclasses.replace(MODEL, pattern="AA", window=12, passes=1),
)


@pytest.mark.parametrize("config", [CONFIG, WHOLE], ids=["by page", "whole"])
def test_every_fact_lies_as_far_back_as_it_says(config):
    """Beyond the distances of training too; a model that keeps everything keeps all of it."""
    for distance in (1, 7):
        asked = at_distance(config, distance, tokens=1 << 20)
        task = tasks.make(asked.task)
        example = task.example("test", 0)
        stream = np.concatenate([
            row[:length] for row, length in zip(example.tokens_WL, example.length_W, strict=True)
        ])  # fmt: skip
        assert len(stream) == 4 * (distance + 1)
        keys = np.flatnonzero(stream[: 4 * distance] < TASK.keys)
        told = dict(zip(stream[keys].tolist(), stream[keys + 1].tolist(), strict=True))
        assert len(told) == TASK.facts and keys.max() < 4  # all on the first page
        asked = stream[-4::2].tolist()
        assert example.targets_WL[example.mask_WL].tolist() == [told[key] for key in asked]
        assert set(example.depth_WL[example.mask_WL]) == {distance}
        assert len(example.length_W) - 1 == (distance if config is CONFIG else 0)  # sleeps


def test_who_never_learned_guesses_at_any_distance():
    """As often right as the floor says, within four standard errors of its answers."""
    params = sleepnet.init_params(MODEL, jax.random.key(0))
    (row,) = forgetting(params, CONFIG, (30,), tokens=1)
    assert (row.depth, row.examples, row.passes, row.floor) == (30, 16, 1, 0.25)
    assert row.accuracy < row.floor + 4 * (row.floor * (1 - row.floor) / row.answers) ** 0.5


def test_what_was_measured_on_another_run_is_measured_anew(tmp_path, monkeypatch):
    """Copied from a run of another seed, or of other parameters; the run's own is not."""
    asked = []

    def measured(params, config, distances):
        asked.extend(distances)
        return [Row(depth=distances[0])]

    monkeypatch.setattr(module, "forgetting", measured)
    params = {"head": np.zeros(3, np.float32)}
    others = [
        (params, dataclasses.replace(CONFIG, training=TrainingConfig(seed=1)), 3),
        (params, dataclasses.replace(CONFIG, evaluation=EvaluationConfig(examples=7)), 3),
        ({"head": np.ones(3, np.float32)}, CONFIG, 3),
        (params, CONFIG, 4),
    ]
    for of_other in others:
        for distances in ((2, 5), (5, 2, 9)):
            found = module.forgetting_of_run(tmp_path, params, CONFIG, 3, distances)
            assert found == {distance: {"depth": distance} for distance in distances}
        assert asked == [2, 5, 9]
        asked.clear()
        module.forgetting_of_run(tmp_path, *of_other, (9,))
        assert asked == [9]
        asked.clear()


@dataclasses.dataclass
class Row:
    depth: int


def test_other_tasks_have_no_facts_to_forget():
    model = dataclasses.replace(MODEL, window=8)
    config = ExperimentConfig(model=model, task=DepoConfig())
    with pytest.raises(ConfigError, match=r"task\.name must be 'facts'.*got 'depo'"):
        forgetting({}, config, (1,))
