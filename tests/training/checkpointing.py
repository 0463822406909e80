"""A small state of every dtype that a checkpoint may hold, and ways to spoil its files."""

import jax
import jax.numpy as jnp
import numpy as np

from sleepnet.training.step import TrainState


def make_state(step=0, seed=0, rows=16):
    """float32, bfloat16, int32, uint32 and bool arrays, and scalars; no two alike."""
    rng = np.random.default_rng(seed)
    params = {
        "head": jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32),
        "norm": jnp.asarray(rng.normal(size=rows), jnp.bfloat16),
    }
    opt_state = {
        "mu": jax.tree.map(lambda x: x * 2, params),
        "count": jnp.int32(step),
        "seen": jnp.asarray(rng.integers(0, 2**32, rows), jnp.uint32),
        "mask": jnp.asarray(rng.integers(0, 2, rows), bool),
    }
    recent = jnp.float32(step) + jnp.arange(rows, dtype=jnp.float32)
    return TrainState(jnp.int32(step), params, opt_state, recent)


def assert_same(state, reference):
    """Bit for bit, whatever the devices."""
    assert jax.tree.structure(state) == jax.tree.structure(reference)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(reference), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def damages(folder, flips):
    """(file, damage, seed) for each file of a checkpoint."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = str(path.relative_to(folder))
        if path.stat().st_size:
            yield from ((file, "flipped", seed) for seed in range(flips))
            yield from ((file, "truncated", seed) for seed in range(2))
            yield file, "emptied", 0
        yield file, "deleted", 0


def spoil(path, how, seed) -> bool:
    """Whether the file is now another."""
    before = path.read_bytes()
    rng = np.random.default_rng(seed)
    if how == "deleted":
        path.unlink()
        return True
    after = bytearray(before)
    if how == "flipped":
        after[rng.integers(len(after))] ^= 1 << rng.integers(8)
    else:
        del after[rng.integers(len(after)) if how == "truncated" else 0 :]
    path.write_bytes(after)
    return bytes(after) != before
