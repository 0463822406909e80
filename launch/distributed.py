"""One run on several processes: how each finds the others, by JAX's own distributed runtime."""

from absl import flags

from sleepnet.config import ConfigError

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, of a cluster that JAX knows by itself."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Where process 0 listens, HOST:PORT, on any other cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.", lower_bound=0)
_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds to wait for all processes.", lower_bound=1
)


def join():
    """Waits for the other processes, if the flags tell of any; before anything asks for devices.

    Cloud TPU, Slurm, Open MPI and Kubernetes tell JAX who is who: `--distributed` is enough there.

    Raises:
      ConfigError: flags that do not fit, or processes that did not come.
    """
    by_hand = {
        "coordinator_address": _COORDINATOR.value,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }
    given = [name for name, value in by_hand.items() if value is not None]
    if not given and not _DISTRIBUTED.value:
        return
    missing = sorted(by_hand.keys() - set(given))
    if given and missing:
        raise ConfigError(f"--{given[0]} needs --{' and --'.join(missing)} beside it")
    if given:
        _check(**by_hand)

    import jax

    try:
        jax.distributed.initialize(
            **by_hand if given else {}, initialization_timeout=_TIMEOUT.value
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def _check(coordinator_address, num_processes, process_id):
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--coordinator_address must be HOST:PORT, such as 10.0.0.1:8476; "
            f"got {coordinator_address!r}"
        )
    if process_id >= num_processes:
        raise ConfigError(
            f"--process_id must lie in 0..{num_processes - 1} for --num_processes={num_processes}; "
            f"got {process_id}"
        )


def _explain(error) -> str:
    reason = str(error).strip().splitlines()[0]
    if not _COORDINATOR.value:
        return (
            f"--distributed: JAX found no cluster here ({reason}); give --coordinator_address, "
            f"--num_processes and --process_id"
        )
    return (
        f"process {_PROCESS_ID.value} of {_NUM_PROCESSES.value} could not join at "
        f"{_COORDINATOR.value} within {_TIMEOUT.value} s: {reason}. "
        f"python -m launch.doctor with the same flags tells which processes are missing"
    )
