"""What is wrong with a launch, within a minute. Each line: ok, or what is wrong and what to do.

    python -m launch.doctor --config=experiments/depo_small.py --workdir=runs/depo
    python -m launch.doctor --config=... --topology=v5e:4x4      # will it fit a pod?
    python -m launch.doctor --config=... --workdir=... \\
        --coordinator_address=HOST:PORT --num_processes=2 --process_id=K

The last on every machine at once, as launch.train, before it; where JAX finds the cluster by itself
(Cloud TPU, Slurm, GKE), --distributed in place of those three. Exit codes: 0 all is well,
1 something is wrong, 2 the command itself is.
"""

import dataclasses
import json

from absl import flags

from launch import chips, cli
from launch.checks import OK, SKIPPED, WRONG, Finding
from launch.checks.examination import PATIENCE, Cluster, Launch, examine
from sleepnet.config import ConfigError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Of a cluster that JAX knows by itself.")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the launch.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "This one's, from 0.", lower_bound=0)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Judge for these TPUs, such as v5e:4x4.")
_WAIT = flags.DEFINE_float("wait", PATIENCE, "Seconds to wait for other processes.", 1.0, 600.0)
_JSON = flags.DEFINE_bool("json", False, "A line of JSON for each finding.")

LABELS = {OK: "ok", WRONG: "WRONG", SKIPPED: "-"}


def main(_):
    if _TOPOLOGY.value:
        chips.parse_topology(_TOPOLOGY.value)
    launch = Launch(
        config=_CONFIG.value and (lambda: cli.experiment_config(_CONFIG.value)),
        workdir=_WORKDIR.value,
        cluster=_cluster(_ADDRESS.value, _PROCESSES.value, _PROCESS.value),
        detect=_DISTRIBUTED.value,
        topology=_TOPOLOGY.value,
        wait=_WAIT.value,
    )
    bad = []
    for finding in examine(launch):
        print(
            json.dumps(dataclasses.asdict(finding)) if _JSON.value else _line(finding), flush=True
        )
        bad += [finding.check] if finding.status == WRONG else []
    if not _JSON.value:
        print(f"\nwrong: {', '.join(bad)}" if bad else "\nall is well")
    return 1 if bad else 0


def _line(finding: Finding) -> str:
    line = f"{LABELS[finding.status]:6}{finding.check:12}{finding.seen}"
    return line + (f"\n{'':18}-> {finding.advice}" if finding.advice else "")


def _as_json(finding: Finding) -> str:
    return json.dumps(dataclasses.asdict(finding))


def _cluster(address: str | None, processes: int | None, process: int | None) -> Cluster | None:
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


if __name__ == "__main__":
    cli.run(main)
