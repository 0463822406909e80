"""TPU topologies by name: how many devices, and how much memory each has."""

import math
import re

from sleepnet.config import ConfigError, nearest

GIB = 1 << 30
# High-bandwidth memory of a chip (cloud.google.com/tpu/docs/system-architecture-tpu-vm), and how
# many numbers its topologies have.
MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}


def parse_topology(name: str) -> tuple[str, int]:
    """ "v5e:4x4" -> ("v5e", 16): the kind of chip and how many.

    Raises:
      ConfigError: no such chip, or no such shape.
    """
    kind, _, shape = name.partition(":")
    if kind not in MEMORY:
        raise ConfigError(
            f"--topology={name}: no such chip; allowed: {', '.join(MEMORY)}; "
            f"the nearest is {nearest(kind, MEMORY)}"
        )
    example = "x".join(["4"] * DIMENSIONS[kind])
    if not re.fullmatch("x".join([r"[1-9]\d*"] * DIMENSIONS[kind]), shape):
        raise ConfigError(
            f"--topology={name}: a {kind} has a shape of {DIMENSIONS[kind]} numbers, such as "
            f"{kind}:{example}"
        )
    return kind, math.prod(map(int, shape.split("x")))
