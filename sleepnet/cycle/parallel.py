"""Sleep over the devices of this host, under `pmap`: one long window, or many sessions.

Along "window" each device holds a part of every row's tokens: the convolution takes its halo from
the left neighbour, attention gathers the keys and values of the window, and the local rule is the
parallel scan of `sleepnet.ops.gated_delta.device_scan`. Along "sessions" each device sleeps for its
own rows.
Fast weights and results are those of `sleepnet.sleep`, to float32 rounding.

`pmap` is differentiable: take `jax.grad` outside. Other hosts sleep on their own.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sleepnet.config import ModelConfig
from sleepnet.config.checks import choices
from sleepnet.cycle import cache
from sleepnet.cycle.sleep import (
    check_ingestion,
    check_sleep,
    commit,
    ingest,
    refine_window,
    sleep_inputs,
)
from sleepnet.cycle.sleep import sleep as sleep_on_one
from sleepnet.cycle.sleep import sleep_from_tokens as sleep_from_tokens_on_one
from sleepnet.cycle.wake import is_concrete
from sleepnet.integers import as_integer
from sleepnet.types import WakeState

AXES = ("window", "sessions")
_log = logging.getLogger(__name__)


def sleep(
    params,
    state: WakeState,
    *,
    config: ModelConfig,
    passes: int | None = None,
    rows_B=None,
    devices: int | Sequence[Any] | None = None,
    axis: str | None = None,
) -> WakeState:
    """Run `sleepnet.sleep` over several devices.

    Args:
      devices: how many, or which, of `jax.local_devices()`; all by default.
      axis: "window" or "sessions"; by default sessions if every device gets one.

    Raises:
      ValueError: as `sleepnet.sleep`; more devices than there are; an unknown axis.
    """
    passes, rows_B = check_sleep(config, state, passes, rows_B)
    devices, axis = _plan(config, _rows(state), config.window, devices, axis)
    if passes == 1:  # the eviction alone needs no help
        return sleep_on_one(params, state, config=config, passes=passes, rows_B=rows_B)
    if len(devices) == 1:
        params, there, rows_B = jax.device_put((params, state, rows_B), devices[0])
        slept = sleep_on_one(params, there, config=config, passes=passes, rows_B=rows_B)
        return _home(slept, state)
    if axis == "sessions":
        run = _sleep_over_sessions(config, passes, devices)
        rows_B = np.ones(state.window.length_B.shape, bool) if rows_B is None else rows_B
        split = _spread(_split_rows(state, (rows_B,), parts=len(devices)), devices, axis)
        return _join_rows(_home(run(replicate(params, devices), *split), state), rows=len(rows_B))
    run = refine_over_window(config, passes, devices)
    features_PBTD = _spread(_split(state.window.features_BLD, len(devices)), devices, axis)
    whole = replicate((params, sleep_inputs(state)), devices)
    fast_weights = _home(run(*whole, features_PBTD), state)
    return commit(state, fast_weights, rows_B, config=config)


def sleep_from_tokens(
    params,
    state: WakeState,
    tokens_BT,
    *,
    config: ModelConfig,
    length_B=None,
    passes: int | None = None,
    devices: int | Sequence[Any] | None = None,
    axis: str | None = None,
) -> WakeState:
    """Run `sleepnet.sleep_from_tokens` over several devices, parallel from the first pass.

    Args:
      devices, axis: as for `sleep`.
    """
    passes, tokens_BT, length_B = check_ingestion(config, state, tokens_BT, length_B, passes)
    devices, axis = _plan(config, _rows(state), tokens_BT.shape[1], devices, axis)
    if len(devices) == 1:
        params, there, tokens_BT, length_B = jax.device_put(
            (params, state, tokens_BT, length_B), devices[0]
        )
        slept = sleep_from_tokens_on_one(
            params, there, tokens_BT, config=config, length_B=length_B, passes=passes
        )
        return _home(slept, state)
    if axis == "sessions":
        run = _ingest_over_sessions(config, passes, devices)
        split = _split_rows(state, (tokens_BT, length_B), parts=len(devices))
        split = _spread(split, devices, axis)
        return _join_rows(_home(run(replicate(params, devices), *split), state), rows=len(length_B))
    run = _ingest_over_window(config, passes, devices)
    tokens_PBT = _spread(_split(tokens_BT, len(devices)), devices, axis)
    params, state_there, length_B = replicate((params, state, length_B), devices)
    return _home(run(params, state_there, tokens_PBT, length_B), state)


def send(params, *, config: ModelConfig, rows: int, devices=None, axis: str | None = None):
    """Place the parameters where `sleep` of so many rows needs them, so that it sends none.

    Args:
      config, devices, axis: as for `sleep`.

    Raises:
      ValueError: more devices than there are; an unknown axis.
    """
    devices, _ = _plan(config, rows, config.window, devices, axis)
    return jax.device_put(params, devices[0]) if len(devices) == 1 else replicate(params, devices)


def replicate(tree, devices: Sequence[Any]):
    """Copy a tree of arrays to each device; parameters that are there are not sent again."""
    return jax.device_put(tree, _over(devices, "window", P()))


def _spread(tree, devices, axis: str):
    """Put one slice of the first axis of every array on each device."""
    return jax.device_put(tree, _over(devices, axis, P(axis)))


def _over(devices, axis: str, spec: P):
    return NamedSharding(Mesh(np.asarray(devices), (axis,)), spec)


def _plan(config: ModelConfig, rows: int, T: int, devices, axis):
    """Choose the devices that take part, and the axis."""
    devices = _chosen(devices)
    if axis not in (None, *AXES):
        raise ValueError(choices("axis", axis, AXES))
    if axis is None:
        axis = "sessions" if rows >= len(devices) else "window"
    asked = len(devices)
    if axis == "sessions":
        devices = devices[:rows]
    else:
        halo = config.conv_width - 1
        while len(devices) > 1 and -(-T // len(devices)) < halo:
            devices = devices[:-1]
    say = _log.info if len(devices) == asked else _warn_once
    say(
        "sleep of %d rows of %d tokens over %d of %d devices along %s",
        rows, T, len(devices), asked, axis,
    )  # fmt: skip
    if config.backend == "pallas" and axis == "window" and len(devices) > 1:
        _warn_once("the kernel of backend='pallas' is for one device: along window XLA's form runs")
    return devices, axis


@functools.lru_cache(maxsize=64)
def _warn_once(message: str, *values):
    _log.warning(message, *values)


def _chosen(devices) -> tuple[Any, ...]:
    here = jax.local_devices()
    if devices is None:
        return tuple(here)
    if not np.iterable(devices):
        note = f" (this host's {here[0].platform} devices) or a list of devices"
        return tuple(here[: as_integer("devices", devices, 1, len(here), note=note)])
    chosen = tuple(devices)
    strangers = [str(device) for device in chosen if device not in here]
    if strangers or not chosen:
        raise ValueError(f"devices must be among jax.local_devices(); got {strangers or 'none'}")
    return chosen


@functools.lru_cache(maxsize=64)
def refine_over_window(config, passes, devices):
    """`refine_window` with a part of the window on each device; compiled once for its arguments."""

    def run(params, inputs, features_BTD):
        return refine_window(
            params, inputs, features_BTD, config=config, passes=passes, axis="window"
        )

    # The results are the same on all devices by construction: take any.
    return jax.pmap(
        run, axis_name="window", in_axes=(None, None, 0), out_axes=None, devices=devices
    )


@functools.lru_cache(maxsize=64)
def _ingest_over_window(config, passes, devices):
    def run(params, state, tokens_BT, length_B):
        return ingest(
            params, state, tokens_BT, length_B, config=config, passes=passes, axis="window"
        )

    return jax.pmap(
        run, axis_name="window", in_axes=(None, None, 0, None), out_axes=None, devices=devices
    )


@functools.lru_cache(maxsize=64)
def _sleep_over_sessions(config, passes, devices):
    def run(params, state, rows_B):
        return sleep_on_one(params, state, config=config, passes=passes, rows_B=rows_B)

    return jax.pmap(run, axis_name="sessions", in_axes=(None, 0, 0), devices=devices)


@functools.lru_cache(maxsize=64)
def _ingest_over_sessions(config, passes, devices):
    def run(params, state, tokens_BT, length_B):
        return sleep_from_tokens_on_one(
            params, state, tokens_BT, config=config, length_B=length_B, passes=passes
        )

    return jax.pmap(run, axis_name="sessions", in_axes=(None, 0, 0, 0), devices=devices)


def _split(x_BT, parts):
    """(B, T, ...) -> (P, B, T / P, ...), padded at the end."""
    B, T, *rest = x_BT.shape
    x = jnp.pad(x_BT, [(0, 0), (0, -T % parts)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(B, parts, -1, *rest), 1, 0)


@functools.partial(jax.jit, static_argnames="parts")
def _split_rows(state: WakeState, others, *, parts: int):
    """Every batch axis split into (P, B / P), padded, and P in front; those of `others` lead."""

    def split(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % parts)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jax.tree.map(split, state, cache.batch_axes(state)), *(split(x, 0) for x in others)


@functools.partial(jax.jit, static_argnames="rows")
def _join_rows(state: WakeState, *, rows: int):
    """Undo `_split_rows`."""

    def join(x, axis):
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, rows, axis=axis)

    return jax.tree.map(join, state, cache.batch_axes(state))


def _rows(state: WakeState) -> int:
    return state.window.length_B.shape[0]


def _home(tree, state: WakeState):
    """Copy the result back to the devices of the state, so that later calls run there."""
    homes = (
        x.sharding
        for x in (state.window.length_B, *jax.tree.leaves(state))
        if isinstance(x, jax.Array) and is_concrete(x)
    )
    return jax.device_put(tree, next(homes, jax.local_devices()[0]))
