"""A parameter that is split is whole where it is used, and nowhere else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree
from jax.sharding import NamedSharding, PartitionSpec

from sleepnet.nn.fsdp import Part, on_one_device, used_whole

DEVICES = 2


def network(layer):
    def loss(params, x):
        for matrix in params:
            x = x + layer(matrix, x)
        return jnp.sum(x**2)

    return loss


def layer(matrix, x):
    return jnp.tanh(x @ matrix)


def split_loss(params, x):
    """Of rows and columns spread over the devices."""

    def on_device(params, x):
        parts = [Part(here, -1, "fsdp", "float32") for here in params]
        return network(used_whole(layer))(parts, x)[None]

    mesh = jax.make_mesh((DEVICES,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    shares = jax.shard_map(
        on_device, mesh=mesh, check_vma=False, out_specs=PartitionSpec("fsdp"),
        in_specs=(PartitionSpec(None, "fsdp"), PartitionSpec("fsdp")),
    )(params, x)  # fmt: skip
    return jnp.sum(shares)


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(6, 6)).astype(np.float32) for _ in range(3)]
    return params, rng.normal(size=(4, 6)).astype(np.float32)


def test_the_gradient_is_that_of_whole_parameters(arguments):
    assert_agree(
        jax.jit(jax.grad(split_loss))(*arguments), jax.grad(network(layer))(*arguments), tol=1e-5
    )


def test_the_backward_pass_gathers_again_and_keeps_no_whole_parameter(arguments):
    """Each of three layers gathers on the way there and on the way back; scatters once."""
    text = jax.jit(jax.grad(split_loss, argnums=(0, 1))).lower(*arguments).as_text()
    assert len(re.findall(r"stablehlo\.all_gather", text)) == 2 * 3
    assert len(re.findall(r"stablehlo\.reduce_scatter", text)) == 3


def test_plain_parameters_are_left_alone(arguments):
    """No checkpoint, no collective: the same program."""
    params, x = arguments
    plain, wrapped = (
        str(jax.make_jaxpr(jax.grad(network(f)))(params, x)) for f in (layer, used_whole(layer))
    )
    assert plain == wrapped


def test_split_parameters_come_whole_onto_one_device(arguments):
    """And those that are on one already stay the same arrays."""
    (matrix, *_), _ = arguments
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    split = jax.device_put(matrix, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    whole = on_one_device({"split": split, "numpy": matrix})
    assert whole["split"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(whole["split"], matrix)
    assert on_one_device(whole)["split"] is whole["split"]
