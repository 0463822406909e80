"""ejkernel's gated delta rule in XLA, chunks of 64."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
from ejkernel.kernels._xla.gated_delta_rule import gated_delta_rule

VERSIONS = {name: importlib.metadata.version(name) for name in ("ejkernel", "jax")}
_inputs: dict[str, jax.Array] = {}


def load(arrays):
    _inputs.clear()
    _inputs.update({name: jnp.asarray(x) for name, x in arrays.items()})


def run(work):
    names, compiled = {
        "forward": (("out", "state"), _forward),
        "forward + backward": (("dq", "dk", "dv", "dg", "dbeta"), _gradients),
    }[work]
    results = jax.block_until_ready(compiled(*_inputs.values()))
    return lambda: dict(zip(names, map(np.asarray, results), strict=True))


@jax.jit
def _forward(q, k, v, g, beta):
    return gated_delta_rule(q, k, v, beta, g, chunk_size=64, use_qk_l2norm=False)


def _loss(*inputs):
    out, state = _forward(*inputs)
    return jnp.sum(out**2) + jnp.sum(state**2)


_gradients = jax.jit(jax.grad(_loss, range(5)))
