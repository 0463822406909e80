"""The processes of a launch: as they are named, or as JAX finds them by itself."""

import os
from typing import NamedTuple


class Cluster(NamedTuple):
    """As `jax.distributed.initialize` takes it."""

    coordinator_address: str
    num_processes: int
    process_id: int


def detect(wait: float) -> Cluster | None:
    """The cluster that `jax.distributed.initialize()` would join: of Cloud TPU, Slurm, Open MPI or
    Kubernetes; None if there is none, or JAX does not tell.

    JAX says whom it has found only when all have joined; where one does not come, it aborts and
    names nobody. So that the roll can be called before, its inside is asked, here and nowhere else.
    Where that has changed, JAX joins as if nobody had asked.

    Args:
      wait: seconds for the name of process 0 to become known.
    """
    try:
        from jax._src.clusters import ClusterEnv

        address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, round(wait)
        )
    except Exception:  # of a JAX that we do not know; or JAX will say it when it joins
        return None
    if address is None or processes is None or process is None:
        return None
    return Cluster(address, processes, process)
