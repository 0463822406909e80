"""What `launch.benchmark` times: each module says how it measures, and has
`run(options)`, which returns {"rows": [{column: value}]} and perhaps more for the record; `TAKES`
names the options that it heeds."""

import dataclasses
import os
import pathlib

Shape = tuple[int, int, int, int]  # B, T, H and K = V


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of every suite, each of which heeds some.

    shapes: B, T, H and K = V of the local rule; each suite has its own by default.
    peers: names of other implementations to run beside ours.
    environments: folder with a Python environment for each peer.
    """

    repeats: int
    shapes: tuple[Shape, ...] = ()
    peers: tuple[str, ...] = ()
    environments: pathlib.Path = pathlib.Path(".venv-peers")


def threads() -> int:
    """How many threads JAX uses on CPU: NPROC, or the cores this process may run on."""
    return int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))
