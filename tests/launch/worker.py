"""One of several processes that train together: what it sees goes to a file. Not a test itself.

python tests/launch/worker.py --out=FOLDER --fsdp=2 [and the flags of launch.common.distributed]
"""

import functools
import pathlib

import jax
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils

from launch.common import distributed
from sleepnet import tasks
from sleepnet.config import MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training import sharding
from sleepnet.training.step import init_train_state, make_train_step

_OUT = flags.DEFINE_string("out", None, "Folder.", required=True)
_FSDP = flags.DEFINE_integer("fsdp", 1, "Of the mesh.")
TASK = DepoConfig(nodes=6, symbols=6, hops=3, queries=3, window=6)
MODEL = ModelConfig(vocab_size=9, pattern="AG", d_model=16, num_heads=2, window=6, passes=2)
TRAINING = TrainingConfig(steps=50, batch_size=16, warmup_steps=1)


def main(_):
    config = ExperimentConfig(
        model=MODEL, task=TASK, training=TRAINING, mesh=MeshConfig(fsdp=_FSDP.value)
    )
    distributed.join(config, _OUT.value)
    with distributed.parting():
        train(config)


def train(config):
    mesh = sharding.make_mesh(config, jax.devices())
    task = tasks.make(TASK)
    step = make_train_step(
        MODEL, TRAINING, task.window_passes(MODEL.passes), task.scored_per_window, mesh=mesh
    )
    start = functools.partial(init_train_state, MODEL, TRAINING)
    placed = sharding.of_state(mesh, jax.eval_shape(start))
    state, losses, seen = jax.jit(start, out_shardings=placed)(), [], []
    size = TRAINING.batch_size
    rows = sharding.local_rows(mesh, size)
    for local in tasks.batches(task, "train", size, num_batches=TRAINING.steps, rows=rows):
        batch = sharding.place_batch(mesh, local, size)
        state, metrics = step(state, batch)
        losses.append(jax.device_get(metrics))
        seen.append(batch._asdict())
    everything = {"seen": seen, "params": state.params}
    everything = multihost_utils.process_allgather(everything, tiled=True)
    flat, _ = jax.tree_util.tree_flatten_with_path(everything | {"losses": losses})
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
    name = f"process{jax.process_index()}.npz"
    np.savez(pathlib.Path(_OUT.value) / name, rows=np.asarray(rows), **arrays)


if __name__ == "__main__":
    app.run(main)
