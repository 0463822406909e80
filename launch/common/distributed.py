"""One run on several processes: who they are, and how they find each other.

Cloud TPU, Slurm, Open MPI and Kubernetes tell JAX by themselves: --distributed is enough. Anywhere
else every process gets the address of process 0, their number, and its own.
"""

import contextlib
import os
import pathlib
import re
import sys
import threading
import traceback

from absl import flags

from launch.common import cli
from launch.common.live_line import notify
from launch.doctor.clusters import Cluster, detect
from launch.doctor.examination import call_the_roll
from launch.doctor.findings import WRONG
from sleepnet import storage
from sleepnet.config import ConfigError
from sleepnet.experiment import ExperimentConfig

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, of a cluster that JAX knows by itself."
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the launch.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "This one's, from 0.", lower_bound=0)
_WAIT = flags.DEFINE_integer(
    "wait", None, "Seconds to wait for other processes; by default 50, the doctor 15.", 1, 3600
)
PATIENCE = 50  # of a run, whose processes may still be importing
PARTING_SECONDS = 10.0  # to wait for others that may know of no error
TOGETHER_SECONDS = 300.0  # for others that end, too, and may be slow; JAX gives up then
# Begins what XLA raises, of several types, where a collective fails; too little memory is no such.
STATUS = r"(?!RESOURCE_EXHAUSTED)[A-Z_]+: "


def cluster() -> Cluster | None:
    """The processes that the flags tell of; None if they name none.

    Raises:
      ConfigError: flags that do not belong together, or say what cannot be.
    """
    address, processes, process = _ADDRESS.value, _PROCESSES.value, _PROCESS.value
    if address is None and processes is None and process is None:
        return None
    if address is None or processes is None or process is None:
        raise ConfigError(
            "--coordinator_address, --num_processes and --process_id go together; or give "
            "--distributed alone where JAX finds its cluster by itself (Cloud TPU, Slurm, GKE)"
        )
    if process >= processes:
        raise ConfigError(f"--process_id must lie in 0..{processes - 1}; got {process}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--coordinator_address must be HOST:PORT, such as 10.0.0.2:8476; got {address}"
        )
    return Cluster(coordinator_address=address, num_processes=processes, process_id=process)


def wait(default: float) -> float:
    """Seconds to wait for other processes."""
    return default if _WAIT.value is None else _WAIT.value


def join(config: ExperimentConfig, workdir: pathlib.Path):
    """Waits for the other processes, if there are any; before anything asks for devices.

    Where they are known before, the roll is called first: JAX aborts without a name when one is
    missing.

    Raises:
      ConfigError: who is missing, is of another launch, or does not see the workdir of process 0.
      StorageError: process 0 cannot write to the workdir.
    """
    found = cluster()
    if found is None:
        if not DISTRIBUTED.value:
            return
        found = detect(wait(PATIENCE))
    if found is not None:
        _call_the_roll(found, config, workdir)
    import jax

    told = {} if found is None else found._asdict()
    try:
        jax.distributed.initialize(**told, initialization_timeout=round(wait(PATIENCE)))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"could not join the other processes: {reason}; python -m launch.doctor with the "
            f"same flags tells why"
        ) from error
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        # On CPU only the first process finds its programs there. It would be done while the others
        # compile, and Gloo waits for nobody longer than 30 seconds.
        jax.config.update("jax_enable_compilation_cache", False)


def _call_the_roll(found: Cluster, config: ExperimentConfig, workdir: pathlib.Path):
    refused = None
    if found.process_id == 0:
        try:
            storage.prepare_folder(workdir)
        except storage.StorageError as error:
            refused = error  # the others come for nothing, and are told so
    seen_in = None if refused else workdir
    findings = list(call_the_roll(found, config, seen_in, wait(PATIENCE)))
    if refused is not None:
        raise refused
    for finding in findings:
        if finding.status == WRONG and finding.check != "clocks":
            raise ConfigError(
                f"process {found.process_id} of {found.num_processes}: {finding.seen}; "
                f"{finding.advice}"
            )


@contextlib.contextmanager
def parting():
    """Where one of several processes ends its program: whatever threads still wait for others.

    Errors for a person to read are as a rule errors of all processes, which part before they end:
    one that finds another gone would abort. Any other error is of this process alone: it ends at
    once, so that the others find it gone; but where a collective failed another is gone already,
    and that JAX aborts this one tells so. Of a process that is alone, nothing changes.
    """
    import jax

    code = 0
    try:
        yield
    except BaseException as end:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(end, SystemExit):
            code = end.code or 0
        elif (told := cli.complain_of(end)) is not None:
            code = told
        elif re.match(STATUS, str(end)):
            raise
        else:
            traceback.print_exception(end)
            _end(1)
    if jax.distributed.is_initialized():
        # Others who do not part, because they know of no error, are not waited for.
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(PARTING_SECONDS if code == cli.USER_ERROR else TOGETHER_SECONDS)
        _end(code)


def _end(code):
    """Without waiting for threads: those of Orbax wait minutes for a process that has failed."""
    for stream in (sys.stdout, sys.stderr):
        notify(stream, "", end="")
    os._exit(code)
