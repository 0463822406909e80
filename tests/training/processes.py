"""One of several processes that save or restore together; a program that tests start.

processes.py COORDINATOR COUNT INDEX WORKDIR ACTION...: all processes run the same actions.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
sys.path.insert(0, os.path.dirname(__file__))

import jax
import numpy as np
from checkpointing import make_state
from jax.sharding import NamedSharding, PartitionSpec

from sleepnet import storage
from sleepnet.training.checkpoint import Checkpoints, SaveError

jax.config.update("jax_cpu_collectives_implementation", "gloo")


def made(step):
    """Large enough that each process writes files of its own."""
    return make_state(step, seed=step, rows=1024)


def place(leaf):
    """Split over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    spec = PartitionSpec("x") if leaf.ndim else PartitionSpec()
    return NamedSharding(mesh, spec)


def spread(state):
    def put(leaf):
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, place(leaf), lambda index: whole[index])

    return jax.tree.map(put, state)


def like():
    shapes = jax.eval_shape(lambda: made(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), shapes)


def holds(state, step):
    """Whether this process's pieces are those of the state that was saved at `step`."""
    right = made(step)
    pieces = zip(jax.tree.leaves(state), jax.tree.leaves(right), strict=True)
    return all(
        np.asarray(shard.data).tobytes() == np.asarray(whole)[shard.index].tobytes()
        for leaf, whole in pieces
        for shard in leaf.addressable_shards
    )


def main(coordinator, count, index, workdir, *actions):
    if int(count) > 1:
        jax.distributed.initialize(coordinator, int(count), int(index))
    checkpoints = Checkpoints(pathlib.Path(workdir))
    for action in actions:
        name, _, value = action.partition("=")
        if name == "save":
            state = spread(made(int(value)))
            same = storage.digests(state) == storage.digests(made(int(value)))
            checkpoints.save(state)
            print("saving", value, "digests", same, flush=True)
        elif name == "wait":
            try:
                checkpoints.wait()
                print("waited", checkpoints.steps(), flush=True)
            except SaveError as error:
                print("SaveError", error, flush=True)
        elif name == "restore":
            state, warnings = checkpoints.restore_latest(like())
            step = int(state.step)
            print("restored", step, holds(state, step), len(warnings), flush=True)
        elif name == "fail" and int(value) == int(index):
            fail_once(checkpoints)


def fail_once(checkpoints):
    """The next save of this process alone fails in the background, as if its disk were full."""
    finish = checkpoints._finish

    class Failing:
        def result(self):
            raise OSError(28, "No space left on device")

    def failing(step, writing, done):
        checkpoints._finish = finish
        finish(step, Failing(), done)

    checkpoints._finish = failing


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Where one process failed, Orbax's threads in the others wait for it up to five minutes, and
    # the interpreter for them.
    if any(action.startswith("fail") for action in sys.argv):
        os._exit(0)
