"""Does the run fit the devices: its mesh, its batch, its memory, its data?"""

import dataclasses
import math
import os
import time
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from launch.doctor.findings import Finding, ok, wrong
from launch.doctor.folder import size
from sleepnet import tasks
from sleepnet.config import ConfigError
from sleepnet.config.model import REMAT_LEVELS
from sleepnet.experiment import ExperimentConfig
from sleepnet.training import sharding
from sleepnet.training.step import TrainState, score, state_shapes

# What XLA needs on a CPU beside the arrays counted here, measured on depo_small with every
# `remat`: 0.7 to 1.7 times them.
UNCERTAIN = 1.7


def check_mesh(config: ExperimentConfig, num_devices: int) -> list[Finding]:
    try:
        data, fsdp = sharding.mesh_shape(config, num_devices)
    except ConfigError as error:
        seen, _, nearest = str(error).partition("; the nearest is ")
        return [wrong("mesh", seen, f"take {nearest}" if nearest else "take a mesh that fits")]
    rows = config.training.batch_size // (data * fsdp * config.training.parts)
    return [
        ok("mesh", f"data {data} x fsdp {fsdp} over {num_devices} devices, {rows} examples "
           f"on each at a time")
    ]  # fmt: skip


def check_data(config: ExperimentConfig) -> list[Finding]:
    """An example of each split is made and checked."""
    task = tasks.make(config.task)
    began = time.perf_counter()
    try:
        for split in ("train", "test"):
            tasks.check_batch(task.example(split, 0), config.model.vocab_size)
    except (OSError, ValueError) as error:
        return [wrong("data", str(error), "see the fields of config.task")]
    took = (time.perf_counter() - began) / 2
    return [ok("data", f"{config.task.name}: examples of both splits made, {took * 1e3:.1f} ms "
               f"each")]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    state: int  # parameters and what the optimizer keeps
    gradients: int
    gathered: int  # parameters made whole, and then their gradients
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def check_memory(config: ExperimentConfig, num_devices: int, available: int) -> list[Finding]:
    try:
        need = memory(config, num_devices)
    except ConfigError:
        return []  # check_mesh has said it
    return judge_memory(config, need, available)


def judge_memory(config: ExperimentConfig, need: Memory, available: int) -> list[Finding]:
    line = (
        f"about {size(need.total)} of {size(available)} a device (state {size(need.state)}, "
        f"gradients {size(need.gradients)}, gathered parameters {size(need.gathered)}, "
        f"activations {size(need.activations)})"
    )
    if need.total > available:
        return [wrong("memory", line, _lighter(config))]
    if need.total * UNCERTAIN > available:
        line += "; that is near: python -m launch.compile tells exactly"
    return [ok("memory", line)]


def _lighter(config):
    ways = ["more devices", "training.parts=N"]
    if config.model.remat == "none":
        ways.insert(0, "model.remat=window+pass")
    if config.mesh.fsdp == 1:
        ways.append("mesh.fsdp=P")
    return ", ".join(ways[:-1]) + f" or {ways[-1]} need less"


def state_on_device(config: ExperimentConfig, num_devices: int) -> TrainState:
    """The shapes of a device's share."""
    mesh: Any = AbstractMesh(sharding.mesh_shape(config, num_devices), sharding.AXES)
    state = state_shapes(config, None)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        state, sharding.of_state(mesh, state),
    )  # fmt: skip


def num_bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(config: ExperimentConfig, num_devices: int) -> Memory:
    """What a training step keeps on a device, from shapes alone: nothing is compiled.

    Activations are what the backward pass is handed, and where it recomputes, what it is handed
    within one window, pass or block.
    """
    data, fsdp = sharding.mesh_shape(config, num_devices)
    here = state_on_device(config, num_devices)
    rows = config.training.batch_size // (data * fsdp * config.training.parts)
    params = state_shapes(config, None).params
    whole = num_bytes(params)
    gathered = 0
    if fsdp > 1:
        once = 2 * whole  # with their gradients
        gathered = once if config.mesh.gather == "step" else once // config.model.num_blocks
    return Memory(
        state=num_bytes(here),
        gradients=num_bytes(here.params),
        gathered=gathered,
        activations=_activations(config, params, rows),
    )


def _activations(config: ExperimentConfig, params, rows: int) -> int:
    task = tasks.make(config.task)
    window_passes = task.window_passes(config.model.passes)
    units = {
        "window": len(window_passes),
        "pass": sum(window_passes),
        "block": sum(window_passes) * config.model.num_blocks,
    }
    left = [level for level in REMAT_LEVELS if level in config.model.remat_levels]
    total, share = 0, 1
    while True:
        total += _residuals(config, task, window_passes, params, rows, left) // share
        if not left:
            return total
        share = units[left.pop(0)]


def _residuals(config, task, window_passes, params, rows: int, remat: list[str]) -> int:
    """Bytes of the arrays that the forward pass leaves for the backward pass."""
    model = dataclasses.replace(config.model, remat="+".join(remat) or "none", unroll=False)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)), np.asarray(x).dtype),
        task.example("train", 0),
    )

    def left_behind(params, batch):
        def loss(params):
            seen = score(
                params, batch, model=model,
                window_passes=window_passes, scored_per_window=task.scored_per_window,
            )  # fmt: skip
            return jnp.sum(seen.nll_BWL)

        return jax.vjp(loss, params)[1]

    jaxpr = jax.make_jaxpr(left_behind)(params, batch).jaxpr
    given = set(jaxpr.invars)
    made = {
        out for out in jaxpr.outvars
        if not isinstance(out, jax.extend.core.Literal) and out not in given
    }  # fmt: skip
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in made)


def device_memory(device) -> int:
    """Bytes that a device offers; a CPU's share of this machine's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // jax.local_device_count()
