"""Where the arrays of training lie: one mesh of devices, one rule per kind of array.

The batch is split over all devices. Parameters, their gradients and what the optimizer keeps for
them are whole on every "data" row of the mesh and split over its "fsdp" columns (fully sharded data
parallelism, as ZeRO stage 3, arXiv 1910.02054). Losses are computed under `shard_map`, each device
on its own rows, so that every collective stands in this code: parameters are gathered where a block
runs, or once a step, and their gradients are summed and scattered behind it. Nothing depends on how
many processes hold the devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sleepnet.config import ConfigError
from sleepnet.experiment import ExperimentConfig
from sleepnet.nn.fsdp import Part, whole

DATA, FSDP = AXES = ("data", "fsdp")

# The axes of each parameter by its name: R repeats of the blocks' period, D features of the
# residual stream, F of a projection, C channels and S taps of the convolution, Y vocabulary,
# L places of a window.
PARAMETER_AXES = {
    "embedding": "YD",
    "positions": "LD",
    "head": "DY",
    "final_norm": "D",
    **dict.fromkeys(("attention_norm", "delta_norm", "mlp_norm"), "RD"),
    **dict.fromkeys(("query", "key", "value", "gate", "timestep", "beta"), "RDF"),
    **dict.fromkeys(("mlp_in", "mlp_gate"), "RDF"),
    **dict.fromkeys(("out", "mlp_out"), "RFD"),
    "conv": "RSC",
    **dict.fromkeys(("A_log", "dt_bias", "out_norm"), "RF"),
}
# The axis that is split over "fsdp". Every matrix has exactly one of them; arrays with neither are
# a number per head, and whole everywhere.
SPLIT = ("D", "C")


def make_mesh(config: ExperimentConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of `config.mesh` over `devices`, of all processes.

    Raises:
      ConfigError: the mesh does not fit the devices, the batch or the width of the model.
    """
    data, fsdp = mesh_shape(config, len(devices))
    used = devices[: data * fsdp]
    missing = {device.process_index for device in devices} - {d.process_index for d in used}
    if missing:
        raise ConfigError(
            f"mesh.data={data} x mesh.fsdp={fsdp} is {len(used)} of {_there(len(devices))}, and "
            f"leaves those of process {min(missing)} idle; leave mesh.data out, and it takes all"
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=used)


def mesh_shape(config: ExperimentConfig, num_devices: int) -> tuple[int, int]:
    """(data, fsdp) over so many devices; raises ConfigError as `make_mesh`."""
    fsdp = _fsdp(config, num_devices)
    return _data(config, num_devices, fsdp), fsdp


def _fsdp(config, num_devices) -> int:
    fsdp, width = config.mesh.fsdp, config.model.d_model
    takes_all = config.mesh.data is None
    allowed = [
        n for n in range(1, num_devices + 1)
        if width % n == 0 and (num_devices % n == 0 or not takes_all)
    ]  # fmt: skip
    if fsdp in allowed:
        return fsdp
    there = f"divide {_there(num_devices)}" if takes_all else f"be within {_there(num_devices)}"
    raise ConfigError(f"mesh.fsdp={fsdp}: it must {there}, and divide model.d_model={width}; "
                      f"{_choice(fsdp, allowed)}")  # fmt: skip


def _data(config, num_devices, fsdp) -> int:
    given, most = config.mesh.data, num_devices // fsdp
    batch, parts = config.training.batch_size, config.training.parts
    allowed = [n for n in range(1, most + 1) if batch % (n * fsdp * parts) == 0]
    data = most if given is None else given
    if data in allowed:
        return data
    if given is None or not allowed:
        raise ConfigError(_batch_does_not_fit(batch, min(data, most), fsdp, parts, allowed))
    if given > most:
        why = f"with mesh.fsdp={fsdp}, {given * fsdp} are more than {_there(num_devices)}"
    else:
        why = f"training.batch_size={batch} is no multiple of {given} x {fsdp} (mesh.fsdp)"
        why += f" x {parts} (training.parts)"
    raise ConfigError(f"mesh.data={given}: {why}; {_choice(given, allowed)}")


def _batch_does_not_fit(batch, data, fsdp, parts, allowed_data) -> str:
    whole = data * fsdp * parts
    below, above = batch // whole * whole, -(-batch // whole) * whole
    near = above if below == 0 or above - batch < batch - below else below
    other = f"; or set mesh.data={allowed_data[-1]}" if allowed_data else ""
    return (
        f"training.batch_size={batch} must be a multiple of the devices of the mesh times "
        f"training.parts, {data} x {fsdp} x {parts}; the nearest is {near}{other}"
    )


def _there(num_devices: int) -> str:
    return "the one device there is" if num_devices == 1 else f"the {num_devices} devices there are"


def _choice(value: int, allowed: list[int]) -> str:
    near = min(allowed, key=lambda n: abs(n - value))
    return f"allowed: {', '.join(map(str, allowed))}; the nearest is {near}"


def of_state(mesh: Mesh, state: Any) -> Any:
    """A sharding per array of a tree of parameters, gradients or optimizer state.

    Args:
      state: arrays, or their shapes. An array is known by the last name of its path, so that
        what an optimizer keeps for a parameter lies as the parameter does; arrays without a name
        are whole everywhere.
    """

    def sharding(path, leaf):
        return NamedSharding(mesh, _spec(mesh, path, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec(mesh, path, shape) -> PartitionSpec:
    if not path or not isinstance(path[-1], jax.tree_util.DictKey):
        return PartitionSpec()
    axes = PARAMETER_AXES[path[-1].key]
    size = mesh.shape[FSDP]
    return PartitionSpec(
        *(FSDP if axis in SPLIT and n % size == 0 else None
          for axis, n in zip(axes, shape, strict=True))
    )  # fmt: skip


def over_rows(mesh: Mesh, f: Callable, *, gather: str, dtype: str) -> Callable:
    """(params, batch, *scalars) -> the sum over devices of f(params, the device's rows, *scalars).

    Args:
      f: returns a tree of scalars; its parameters are whole, or have `Part`s for leaves. Take
        gradients outside.
      gather: "block" or "step"; see `MeshConfig`.
      dtype: in which matrices travel.
    """

    def as_part(here, spec):
        if mesh.shape[FSDP] == 1 or FSDP not in spec:
            return here
        return Part(here, spec.index(FSDP) - here.ndim, FSDP, dtype)

    def run(params, batch, *scalars):
        specs = jax.tree.map(lambda sharding: sharding.spec, of_state(mesh, params))

        def on_device(params, rows, *scalars):
            params = jax.tree.map(as_part, params, specs)
            params = whole(params) if gather == "step" else params
            return jax.tree.map(lambda x: x[None], f(params, rows, *scalars))

        shares = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(AXES), *(PartitionSpec() for _ in scalars)),
            out_specs=PartitionSpec(AXES),
            check_vma=False,  # fresh states are the same on every device, and would have to say so
        )(params, batch, *scalars)
        return jax.tree.map(jnp.sum, shares)

    return run


def over_matrices(mesh: Mesh | None, f: Callable, tree: Any) -> Any:
    """f over all matrices of a tree of stacked parameters (R, in, out), each on one device.

    Matrices of one shape are taken together, whatever their names: every device gets its share of
    them, whole, and gives it back. A matrix crosses the network once there and once back.

    Args:
      f: (M, in, out) -> (M, in, out), matrix by matrix.
      tree: leaves of parameters' names and shapes, split as `of_state` splits them.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    places = [_spec(mesh, path, leaf.shape) if mesh else None for path, leaf in paths]
    groups: dict[Any, list[int]] = {}
    for i, (_, leaf) in enumerate(paths):
        groups.setdefault((leaf.shape[1:], places[i]), []).append(i)
    done: list[Any] = [None] * len(paths)
    for (_, spec), members in groups.items():
        leaves = [paths[i][1] for i in members]
        many = _shared_out(mesh, spec, f) if mesh and mesh.size > 1 else f
        results = many(jnp.concatenate(leaves))
        ends = np.cumsum([len(leaf) for leaf in leaves])[:-1]
        for i, result in zip(members, jnp.split(results, ends), strict=True):
            done[i] = result
    return treedef.unflatten(done)


def _shared_out(mesh, spec, f):
    """f over (M, in, out), split by `spec`, with M shared out over all devices."""
    split = spec.index(FSDP) if FSDP in spec and mesh.shape[FSDP] > 1 else None
    alike = DATA if split is not None else AXES  # the devices that hold the same, once exchanged
    num_alike = mesh.shape[DATA] if split is not None else mesh.size

    def on_device(x):
        num = len(x)
        x = jnp.pad(x, ((0, -num % mesh.size), (0, 0), (0, 0)))
        if split is not None:
            x = jax.lax.all_to_all(x, FSDP, split_axis=0, concat_axis=split, tiled=True)
        if num_alike > 1:
            share = len(x) // num_alike
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(alike) * share, share)
        x = f(x)
        if num_alike > 1:
            x = jax.lax.all_gather(x, alike, tiled=True)
        if split is not None:
            x = jax.lax.all_to_all(x, FSDP, split_axis=split, concat_axis=0, tiled=True)
        return x[:num]

    return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def of_batch(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading axis of examples."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of a global batch that this process's devices hold, rising."""
    places = of_batch(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for place in places.values() for row in np.arange(batch_size)[place].tolist()}
    return tuple(sorted(rows))


def place_batch(mesh: Mesh, local: Any, batch_size: int) -> Any:
    """A global batch, split over the mesh, from the rows of it that `local_rows` names.

    Args:
      local: a tree of NumPy arrays whose leading axis is those rows.
    """
    rows = np.asarray(local_rows(mesh, batch_size))

    def place(x):
        def part(index):
            begin, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, begin)
            return x[first : first + stop - begin]

        shape = (batch_size, *x.shape[1:])
        return jax.make_array_from_callback(shape, of_batch(mesh), part)

    return jax.tree.map(place, local)
