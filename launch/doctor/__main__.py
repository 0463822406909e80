"""What is wrong with a launch, within a minute. Each line: ok, or what is wrong and what to do.

    python -m launch.doctor --config=experiments/depo_small.py --workdir=runs/depo
    python -m launch.doctor --config=... --topology=v5e:4x4      # will it fit a pod?
    python -m launch.doctor --config=... --workdir=... \\
        --coordinator_address=HOST:PORT --num_processes=2 --process_id=K

The last on every machine at once, as launch.train, before it; where JAX finds the cluster by itself
(Cloud TPU, Slurm, GKE), --distributed in place of those three. A machine that is slow or busy needs
more than a minute: --seconds=300. Exit codes: 0 all is well, 1 something is wrong, 2 the command
itself is.
"""

import dataclasses

from absl import flags

from launch.common import chips, cli, distributed
from launch.doctor.examination import PATIENCE, SECONDS, Launch, examine
from launch.doctor.findings import OK, SKIPPED, WRONG, Finding
from sleepnet import strict_json

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", None, "Folder of the run.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Judge for these TPUs, such as v5e:4x4.")
_JSON = flags.DEFINE_bool("json", False, "A line of JSON for each finding.")
_SECONDS = flags.DEFINE_float(
    "seconds", SECONDS, "For all that is looked at; a slow machine needs more.", lower_bound=1.0
)
flags.adopt_module_key_flags(distributed)

LABELS = {OK: "ok", WRONG: "WRONG", SKIPPED: "-"}


def main(_):
    if _TOPOLOGY.value:
        chips.parse_topology(_TOPOLOGY.value)
    launch = Launch(
        config=_CONFIG.value and (lambda: cli.experiment_config(_CONFIG.value)),
        workdir=_WORKDIR.value and str(_WORKDIR.value),
        cluster=distributed.cluster(),
        detect=distributed.DISTRIBUTED.value,
        topology=_TOPOLOGY.value,
        wait=distributed.wait(PATIENCE),
        seconds=_SECONDS.value,
    )
    bad = []
    for finding in examine(launch):
        line = strict_json.dumps(dataclasses.asdict(finding)) if _JSON.value else _line(finding)
        print(line, flush=True)
        bad += [finding.check] if finding.status == WRONG else []
    if not _JSON.value:
        print(f"\nwrong: {', '.join(bad)}" if bad else f"\n{_well()}")
    return 1 if bad else 0


def _well() -> str:
    if _CONFIG.value:
        return "all is well"
    return "the machine is well; --config=experiments/NAME.py and --workdir=... look at a launch"


def _line(finding: Finding) -> str:
    line = f"{LABELS[finding.status]:6}{finding.check:12}{finding.seen}"
    return line + (f"\n{'':18}-> {finding.advice}" if finding.advice else "")


if __name__ == "__main__":
    cli.run(main)
