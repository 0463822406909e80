"""A training step over a mesh of devices is the step on one device, and each holds its share."""

import dataclasses
import functools

import jax
import pytest
from agreement import GRADIENTS, assert_agree

from sleepnet import sharding, tasks
from sleepnet.config import (
    DepoConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    TrainingConfig,
)
from sleepnet.training.step import init_train_state, make_train_step

TASK = DepoConfig(nodes=6, symbols=6, hops=3, queries=3, window=6)
MODEL = ModelConfig(
    vocab_size=9, pattern="G[AGAG]A", d_model=16, num_heads=2, window=6, passes=3,
    learned_positions=True,
)  # fmt: skip
TRAINING = TrainingConfig(steps=4, batch_size=16, warmup_steps=1, clip_norm=0.5)
CONFIG = ExperimentConfig(model=MODEL, task=TASK, training=TRAINING)
MESHES = {
    "data 8": dict(data=8, fsdp=1),
    "fsdp 8": dict(data=1, fsdp=8),
    "data 2 x fsdp 4": dict(data=2, fsdp=4),
    "data 4 x fsdp 2, gathered once": dict(data=4, fsdp=2, gather="step"),
    "three of eight devices idle": dict(data=1, fsdp=4),
}


def over(mesh, config=CONFIG, **training):
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**mesh),
        training=dataclasses.replace(config.training, **training),
    )


def steps_of(config, mesh):
    """The compiled step and the first state, on one device or over a mesh."""
    task = tasks.make(config.task)
    step = make_train_step(
        config.model, config.training, task.window_passes(config.model.passes),
        task.scored_per_window, mesh=mesh, gather=config.mesh.gather,
    )  # fmt: skip
    state = init_train_state(config.model, config.training)
    return step, state if mesh is None else jax.device_put(state, sharding.of_state(mesh, state))


def trained(config, mesh=None):
    """State after all steps, and each step's metrics."""
    step, state = steps_of(config, mesh)
    rows = sharding.local_rows(mesh, config.training.batch_size) if mesh is not None else None
    metrics = []
    for batch in tasks.batches(
        tasks.make(config.task), "train", config.training.batch_size,
        num_batches=config.training.steps, rows=rows,
    ):  # fmt: skip
        if mesh is not None:
            batch = sharding.place_batch(mesh, batch, config.training.batch_size)
        state, row = step(state, batch)
        metrics.append(jax.device_get(row))
    return jax.device_get(state), metrics


@functools.cache
def on_one_device():
    return trained(CONFIG)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_steps_over_a_mesh_are_those_of_one_device(mesh):
    """Losses, gradient norms and the parameters after four steps of Muon and AdamW."""
    config = over(mesh)
    state, metrics = trained(config, sharding.make_mesh(config, jax.devices()))
    expected, expected_metrics = on_one_device()
    assert_agree(metrics, expected_metrics, tol=1e-5)
    assert_agree(state.params, expected.params, tol=GRADIENTS)


@pytest.mark.slow
def test_gradients_through_the_last_pass_are_those_of_one_device():
    """Whose parameters are constants in the passes before, split or not."""
    last = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, gradient_passes=1))
    config = over(dict(data=2, fsdp=4), last)
    state, metrics = trained(config, sharding.make_mesh(config, jax.devices()))
    expected, expected_metrics = trained(last)
    assert_agree(metrics, expected_metrics, tol=1e-5)
    assert_agree(state.params, expected.params, tol=GRADIENTS)
