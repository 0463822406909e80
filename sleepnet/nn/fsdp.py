"""Parameters of which each device holds a part, made whole where they are used.

In training over a mesh (`sleepnet.training.sharding`) the leaves of `params` may be a `Part`. The
model asks for `whole` parameters a block at a time; for plain arrays that is the identity. Whoever
needs whole arrays on one device, outside of training, asks `on_one_device` once.
"""

from typing import Any

import jax
from flax import struct
from jax import lax


@struct.dataclass
class Part:
    """This device's part of a parameter.

    axis: along which it is split; negative, so that it stays when stacked blocks are sliced.
    mesh_axis: the name of the devices' axis.
    dtype: in which it travels; the gradient travels back in it and is summed over uses in the
      dtype of `here`.
    """

    here: jax.Array
    axis: int = struct.field(pytree_node=False)
    mesh_axis: str = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)


def whole(params: Any) -> Any:
    """The tree with every `Part` gathered from all devices."""

    def gather(leaf):
        if not isinstance(leaf, Part):
            return leaf
        # Else XLA for TPU sums a loop's gradients whole, and scatters them behind it.
        here = lax.optimization_barrier(leaf.here).astype(leaf.dtype)
        axis = here.ndim + leaf.axis
        return lax.all_gather(here, leaf.mesh_axis, axis=axis, tiled=True)

    return jax.tree.map(gather, params, is_leaf=_is_part)


def devices_of(tree: Any) -> set[Any]:
    """Return the devices that hold the tree's arrays; none for NumPy's."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return set().union(*(array.devices() for array in arrays))


def on_one_device(params: Any) -> Any:
    """Return the tree with every array whole on one device; as it is if they lie on one already.

    Raises:
      ValueError: arrays that are spread over processes, of which this one holds a part.
    """
    devices = devices_of(params)
    if {device.process_index for device in devices} - {jax.process_index()}:
        raise ValueError(
            "the parameters are spread over several processes, and one process needs all of them: "
            "load them there from a checkpoint, or gather them first"
        )
    if len(devices) < 2:
        return params
    return jax.device_put(params, min(devices, key=lambda device: device.id))


def used_whole(function):
    """`function(params, ...)` with whole parameters, which its backward pass gathers anew."""

    def call(params, *arguments):
        return function(whole(params), *arguments)

    def run(params, *arguments):
        if not any(map(_is_part, jax.tree.leaves(params, is_leaf=_is_part))):
            return function(params, *arguments)
        return jax.checkpoint(call, policy=_all_but_gathered)(params, *arguments)

    return run


def _all_but_gathered(primitive, *_, **__) -> bool:
    """What the backward pass may keep."""
    return primitive.name != "all_gather"


def _is_part(leaf):
    return isinstance(leaf, Part)
