"""The state before the first step, made where the mesh has it: never whole on a device."""

from collections.abc import Callable

import jax

from sleepnet.experiment import ExperimentConfig
from sleepnet.training import sharding
from sleepnet.training.step import TrainState, init_train_state


def init(config: ExperimentConfig, mesh) -> Callable[[], TrainState]:
    """Makes the state, each device its own part; without a mesh, on one device."""

    def make():
        return init_train_state(config.model, config.training)

    if mesh is None:
        return jax.jit(make)
    return jax.jit(make, out_shardings=sharding.of_state(mesh, jax.eval_shape(make)))


def shapes(config: ExperimentConfig, mesh) -> TrainState:
    """Of the state, with the shardings that it shall have."""
    like = jax.eval_shape(init(config, None))
    if mesh is None:
        return like
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        like, sharding.of_state(mesh, like),
    )  # fmt: skip
