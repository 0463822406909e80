"""What is compiled: the train, wake and sleep steps of an experiment, from shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import sleepnet
from launch.compile.topologies import Topology
from sleepnet import tasks
from sleepnet.config import ModelConfig
from sleepnet.config.model import PARTS
from sleepnet.cycle import parallel
from sleepnet.cycle.sleep import sleep_inputs
from sleepnet.experiment import ExperimentConfig
from sleepnet.inference import decoder
from sleepnet.nn.flops import part_flops, training_flops
from sleepnet.ops.gated_delta import chunks
from sleepnet.training import sharding
from sleepnet.training.step import init_train_state, make_train_step

STEPS = ("train", "wake", "sleep")
MOST = 0.85  # of a device's memory for parameters and state: steps need room beside them


@dataclasses.dataclass(frozen=True)
class Step:
    """A program to compile, and what is known of it beforehand.

    lower: traces it.
    kinds: bytes per device of its arguments, by kind.
    flops: of the model's own products per device, without what backward recomputes.
    """

    name: str
    devices: int
    lower: Callable[[], Any]
    kinds: dict[str, int]
    flops: int


def train(config: ExperimentConfig, topology: Topology) -> Step:
    """The training step over the whole topology.

    Raises:
      ConfigError: mesh, batch or width do not fit the devices.
    """
    mesh = sharding.make_mesh(config, topology.devices)
    task = tasks.make(config.task)
    rows = config.training.batch_size // (mesh.size * config.training.parts)
    model = as_on(topology, config.model, rows, config.model.window)
    window_passes = task.window_passes(model.passes)
    step = make_train_step(
        model, config.training, window_passes, task.scored_per_window,
        mesh=mesh, gather=config.mesh.gather,
    )  # fmt: skip
    state = jax.eval_shape(lambda: init_train_state(model, config.training))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.training.batch_size, *np.shape(x)), x.dtype),
        task.example("train", 0),
    )
    placed = sharding.of_state(mesh, state)
    per_row = training_flops(model, window_passes, task.scored_per_window)
    return Step(
        name="train",
        devices=mesh.size,
        lower=lambda: step.lower(state, batch),
        kinds={
            "parameters": _bytes_here(state.params, placed.params),
            "optimizer": _bytes_here(state.opt_state, placed.opt_state),
            "batch": _bytes(batch) // mesh.size,
        },
        flops=per_row * config.training.batch_size // mesh.size,
    )


def wake(config: ExperimentConfig, topology: Topology, rows: int) -> Step:
    """A token of a `Decoder` for each row, with parameters in the compute dtype.

    On one device; where parameters and state would leave it no room, with parameters split over
    all of them, as XLA's partitioner sees fit.
    """
    model = as_on(topology, served(config.model), rows, 1)
    params, state = shapes(model, rows)
    if topology.chip and _bytes((params, state)) > MOST * topology.chip.hbm:
        return _wake_split(model, topology, rows, params, state)
    params = jax.eval_shape(decoder.unstack_params, params)
    state = jax.eval_shape(decoder.unstack_state, state)
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    here = SingleDeviceSharding(topology.devices[0])
    arguments = _placed((params, *decoder.halves(state), tokens), here)
    return Step(
        name=f"wake {rows} rows",
        devices=1,
        lower=lambda: decoder.step.lower(*arguments, config=model),
        kinds={"parameters": _bytes(params), "state": _bytes(state), "batch": _bytes(tokens)},
        flops=rows * _token_flops(model),
    )


def _wake_split(model, topology, rows, params, state) -> Step:
    mesh = jax.make_mesh(
        (1, len(topology.devices)), sharding.AXES,
        axis_types=(AxisType.Auto,) * 2, devices=topology.devices,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    placed = sharding.of_state(mesh, params)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one_token(params, state, tokens_BT):
        return sleepnet.wake(params, state, tokens_BT, config=model, logits="last")

    run = jax.jit(
        one_token, donate_argnums=1, in_shardings=(placed, everywhere, everywhere),
        out_shardings=everywhere,
    )  # fmt: skip
    return Step(
        name=f"wake {rows} rows, split",
        devices=mesh.size,
        lower=lambda: run.lower(params, state, tokens),
        kinds={
            "parameters": _bytes_here(params, placed),
            "state": _bytes(state),
            "batch": _bytes(tokens),
        },
        flops=rows * _token_flops(model) // mesh.size,
    )


def sleep(config: ExperimentConfig, topology: Topology) -> Step | None:
    """Passes 2..N of one row's window over the devices of a host; None if N = 1 runs none."""
    if config.model.passes == 1:
        return None
    devices = topology.host
    model = as_on(topology, served(config.model), 1, config.model.window)
    params, state = shapes(model, 1)
    inputs = jax.eval_shape(sleep_inputs, state)
    here = -(-model.window // len(devices))
    features = jax.ShapeDtypeStruct(
        (len(devices), 1, here, model.d_model), state.window.features_BLD.dtype
    )
    run = parallel.refine_over_window(model, model.passes, devices)
    of_coda = part_flops(model, "coda", model.window)
    whole = (model.passes - 1) * part_flops(model, "core", model.window) + of_coda
    return Step(
        name=f"sleep over {len(devices)}",
        devices=len(devices),
        lower=lambda: run.lower(params, inputs, features),
        kinds={
            "parameters": _bytes(params),
            "state": _bytes(inputs),
            "batch": _bytes(features) // len(devices),
        },
        flops=whole // len(devices),
    )


def _token_flops(model: ModelConfig) -> int:
    """Of one token that attends every place of its window."""
    blocks = sum(part_flops(model, part, 1, model.window) for part in PARTS)
    return blocks + 2 * model.d_model * model.vocab_size


def served(model: ModelConfig) -> ModelConfig:
    """With parameters in the dtype in which they are used."""
    return dataclasses.replace(model, param_dtype=model.compute_dtype)


def as_on(topology: Topology, model: ModelConfig, rows: int, tokens: int) -> ModelConfig:
    """The chunks that the topology's own platform would take, whatever this machine is."""
    chunk = model.chunk or chunks.chunk_size(tokens, topology.platform)
    group = model.chunk_group or chunks.group_size(
        rows * model.num_value_heads, -(-tokens // chunk), topology.platform
    )
    return dataclasses.replace(model, chunk=chunk, chunk_group=group)


def shapes(model: ModelConfig, rows: int):
    """Of parameters and of the state of so many minds."""
    return jax.eval_shape(
        lambda: (sleepnet.init_params(model, jax.random.key(0)), sleepnet.init_state(model, rows))
    )


def _placed(tree, place):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_here(tree, placed) -> int:
    """Of each device's share."""
    shares = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(place.shard_shape(x.shape), x.dtype), tree, placed
    )
    return _bytes(shares)
