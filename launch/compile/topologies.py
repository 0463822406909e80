"""Devices that are not here, for the compiler alone."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from launch.common.chips import CHIPS, Chip
from sleepnet.config import ConfigError
from sleepnet.config.checks import choices

HOST_CHIPS = 4  # of a machine of a slice of several
HOSTS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KNOWN = (
    "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16",
    "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8",
    "v5p:8x8x8",
    "v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16",
    "cpu:1", "cpu:8",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for; `chip` is None for CPUs, of which nothing is promised."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None

    @property
    def platform(self) -> str:
        return "cpu" if self.chip is None else "tpu"

    @property
    def host(self) -> tuple[Any, ...]:
        """The devices of one host, over which a sleep runs."""
        host = HOSTS.get(self.name.split(":")[0])
        if host is None or len(self.devices) <= HOST_CHIPS:
            return self.devices
        return _tpus(host)  # a slice of its own: of a larger one, all devices or one are taken

    @property
    def ici_rate(self) -> float:
        """Bytes per second that leave the chip with the fewest links: one in a corner."""
        assert self.chip is not None
        links = sum(
            0 if size == 1 else 2 if size % self.chip.wraps == 0 else 1
            for size in map(int, self.name.split(":")[1].split("x"))
        )
        return self.chip.ici_rate * links / (2 * self.chip.axes)


def topology(name: str) -> Topology:
    """Of the given name, such as "v5e:16x16"; "cpu:8" are virtual devices of this machine.

    Raises:
      ConfigError: there is none of this name, or what compiles for it is not installed.
    """
    kind = name.split(":")[0]
    if not re.fullmatch(r"cpu:[1-9]\d*", name) and not (
        kind in HOSTS and re.fullmatch(r"\w+:\d+(x\d+)+", name)
    ):
        raise ConfigError(choices("--topology", name, KNOWN))
    devices = _cpus(int(name.split(":")[1])) if kind == "cpu" else _tpus(name)
    return Topology(name, devices, CHIPS.get(kind))


def _cpus(count: int):
    with contextlib.suppress(RuntimeError):  # devices are already made
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise ConfigError(
            f"--topology=cpu:{count}: there are {len(there)}; the nearest is cpu:{len(there)}"
        )
    return tuple(there[:count])


@functools.cache
def _tpus(name: str):
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"topology {name} needs the TPU compiler: pip install -e '.[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks for this machine's own TPU, for minutes
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody here runs on a TPU
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # of several kinds, from several libraries
        kind = name.split(":")[0]
        same = [known for known in KNOWN if known.startswith(kind)]
        wanted = _size(name)
        near = min(same, key=lambda known: abs(math.log(_size(known) / wanted)) if wanted else 0)
        raise ConfigError(
            f"--topology={name}: the TPU compiler knows none ({error}); there are "
            f"{', '.join(same)}; the nearest is {near}"
        ) from error
    return tuple(described.devices)


def _size(name: str) -> int:
    return math.prod(map(int, name.split(":")[1].split("x")))
