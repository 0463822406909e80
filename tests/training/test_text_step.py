"""Training on text: rows that begin anew go through every way of taking a step."""

import dataclasses

import corpora
import jax
import pytest
from agreement import GRADIENTS, assert_agree

from sleepnet import tasks
from sleepnet.config import MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.training import loop, sharding
from sleepnet.training.step import init_train_state, make_train_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ExperimentConfig(
        model=ModelConfig(vocab_size=257, pattern="G", d_model=8, num_heads=2, window=16, passes=2),
        task=corpora.text_config(tmp_path_factory.mktemp("corpus"), windows=2),
        training=TrainingConfig(
            steps=5, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=2
        ),
    )


def one_step(config, mesh=None):
    task = tasks.make(config.task)
    step = make_train_step(
        config.model, config.training, task.window_passes(2), task.scored_per_window, mesh=mesh
    )
    state = init_train_state(config.model, config.training)
    (batch,) = tasks.batches(task, "train", 8, num_batches=1)
    assert batch.reset_W[:, 1:].any()
    if mesh is not None:
        state = jax.device_put(state, sharding.of_state(mesh, state))
        batch = sharding.place_batch(mesh, batch, 8)
    state, metrics = step(state, batch)
    return jax.device_get((state.params, metrics))


def test_a_step_over_a_mesh_and_one_in_parts_are_the_step(config):
    params, metrics = one_step(config)
    meshed = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
    parts = dataclasses.replace(config, training=dataclasses.replace(config.training, parts=2))
    for other in (one_step(meshed, sharding.make_mesh(meshed, jax.devices())), one_step(parts)):
        assert_agree(other[1], metrics, tol=1e-5)
        assert_agree(other[0], params, tol=GRADIENTS)


def test_a_run_that_was_stopped_goes_on_bit_equal(config, tmp_path):
    loop.train(config, tmp_path / "whole")
    calls = iter(range(1, 100))
    loop.train(config, tmp_path / "halves", should_stop=lambda: next(calls) >= 3)
    loop.train(config, tmp_path / "halves")
    of_both = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "halves")]
    assert of_both[0] == of_both[1]
    assert of_both[0].count(b"\n") == 5
