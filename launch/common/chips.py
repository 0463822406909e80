"""TPUs by name: what their data sheets promise, and how many chips and machines a slice has."""

import dataclasses
import math
import re

from sleepnet.config import ConfigError
from sleepnet.config.checks import choices, nearest

GB = 1e9  # as data sheets count


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip, from docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (2026)."""

    flops: float  # of bfloat16 products, per second
    hbm: float  # bytes
    hbm_rate: float  # bytes per second
    ici_rate: float  # bytes per second that leave over all links: half of "bidirectional"
    axes: int  # of the torus; two links a chip along each
    wraps: int  # an axis whose length is a multiple of it is a ring, a shorter one is open


CHIPS = {
    "v4": Chip(275e12, 32 * GB, 1228 * GB, 300 * GB, axes=3, wraps=4),
    "v5e": Chip(197e12, 16 * GB, 819 * GB, 200 * GB, axes=2, wraps=16),
    "v5p": Chip(459e12, 95 * GB, 2765 * GB, 600 * GB, axes=3, wraps=4),
    "v6e": Chip(918e12, 32 * GB, 1640 * GB, 400 * GB, axes=2, wraps=16),
}


def parse_topology(name: str) -> tuple[str, int]:
    """ "v5e:4x4" -> ("v5e", 16): the kind of chip and how many.

    Raises:
      ConfigError: no such chip, or no such shape.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology={name}: no such chip; allowed: {', '.join(CHIPS)}; "
            f"the nearest is {nearest(kind, CHIPS)}"
        )
    axes = CHIPS[kind].axes
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise ConfigError(
            f"--topology={name}: a {kind} has a shape of {axes} numbers, such as "
            f"{kind}:{'x'.join(['4'] * axes)}"
        )
    count = math.prod(map(int, shape.split("x")))
    if axes == 2 and count > (most := max(_SHAPES[2])):
        raise ConfigError(
            f"--topology={name}: a slice of {kind} has at most {most} chips, and this would have "
            f"{count}; the nearest is {kind}:{_SHAPES[2][most]}"
        )
    return kind, count


# What Cloud TPU calls its accelerator types: the kind of chip, and how many of the type's number
# make a chip (TensorCores, where the number counts them).
_TYPES = {"v4": ("v4", 2), "v5litepod": ("v5e", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"},
}  # fmt: skip
# The software that Google names for JAX (cloud.google.com/tpu/docs/runtimes).
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A slice of Cloud TPU, such as v5litepod-16."""

    name: str
    kind: str
    chips: int

    @property
    def topology(self) -> str:
        """As `parse_topology` takes it."""
        return f"{self.kind}:{_SHAPES[CHIPS[self.kind].axes][self.chips]}"

    @property
    def hosts(self) -> int:
        """Virtual machines, each a process of JAX."""
        if CHIPS[self.kind].axes == 2 and self.chips <= 8:
            return 1
        return max(1, self.chips // 4)


def parse_accelerator(name: str) -> Accelerator:
    """Raises ConfigError for what Cloud TPU does not offer, with the nearest that it does."""
    offered = {
        f"{prefix}-{chips * per_chip}": Accelerator(f"{prefix}-{chips * per_chip}", kind, chips)
        for prefix, (kind, per_chip) in _TYPES.items()
        for chips in _SHAPES[CHIPS[kind].axes]
    }
    if name not in offered:
        raise ConfigError(_not_offered(name, list(offered)))
    return offered[name]


def _not_offered(name: str, offered: list[str]) -> str:
    prefix, _, number = name.partition("-")
    alike = [other for other in offered if other.split("-")[0] == prefix]
    if not alike or not number.isdigit():
        return choices("--accelerator", name, alike or offered)
    near = min(alike, key=lambda other: abs(int(other.split("-")[1]) - int(number)))
    return (
        f"--accelerator={name} is not offered; allowed: {', '.join(alike)}; the nearest is {near!r}"
    )
