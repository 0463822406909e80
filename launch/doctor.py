"""What is wrong with a launch, within a minute. Each line: ok, or what is wrong and what to do.

    python -m launch.doctor --config=experiments/depo_small.py --workdir=runs/depo
    python -m launch.doctor --config=... --topology=v5e:4x4      # will it fit a pod?
    python -m launch.doctor --config=... --coordinator_address=HOST:PORT --num_processes=2 \\
        --process_id=K        # on every machine, as launch.train, before it

Exit codes: 0 all is well, 1 something is wrong, 2 the command itself is.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys

from absl import flags

from launch import chips, cli
from launch.checks import (
    OK,
    SKIPPED,
    WRONG,
    Deadline,
    Finding,
    folder,
    ok,
    roll_call,
    skipped,
    software,
    supervise,
    within,
    wrong,
)
from sleepnet.config import ConfigError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the launch.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "This one's, from 0.", lower_bound=0)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Judge for these TPUs, such as v5e:4x4.")
_WAIT = flags.DEFINE_float("wait", 15.0, "Seconds to wait for other processes.", 1.0, 60.0)
_JSON = flags.DEFINE_bool("json", False, "A line of JSON for each finding.")

SECONDS = 55.0  # for all that is looked at
APART = ("alike", "shared", "clocks")  # what does not keep processes from joining


def main(_):
    _check_flags()
    deadline = Deadline(SECONDS + max(0.0, 2 * (_WAIT.value - 15)))
    findings = []
    for finding in _examine(deadline):
        findings.append(finding)
        _show(finding)
    bad = [finding.check for finding in findings if finding.status == WRONG]
    if not _JSON.value:
        print(f"\nwrong: {', '.join(bad)}" if bad else "\nall is well")
    return 1 if bad else 0


def _check_flags():
    given = [flag.value is not None for flag in (_ADDRESS, _PROCESSES, _PROCESS)]
    if any(given) and not all(given):
        raise ConfigError(
            "--coordinator_address, --num_processes and --process_id go together; or leave all "
            "out, and JAX finds its cluster where it can (Cloud TPU, Slurm, GKE)"
        )
    if all(given):
        if _PROCESS.value >= _PROCESSES.value:
            raise ConfigError(
                f"--process_id must lie in 0..{_PROCESSES.value - 1}; got {_PROCESS.value}"
            )
        _, _, port = _ADDRESS.value.rpartition(":")
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"--coordinator_address must be HOST:PORT, such as 10.0.0.2:8476; "
                f"got {_ADDRESS.value}"
            )
    if _TOPOLOGY.value:
        chips.parse_topology(_TOPOLOGY.value)


def _examine(deadline: Deadline):
    yield from software.check()
    config = None
    if _CONFIG.value is None:
        yield skipped("config", "no --config: mesh, memory, disk and data are not judged")
    else:
        findings, config = _read_config()
        yield from findings
    workdir = _WORKDIR.value
    if workdir is None:
        yield skipped("workdir", "no --workdir")
    else:
        found = within(
            10, "workdir", lambda: folder.check(workdir),
            "the file system does not answer: see its mount, or name another --workdir",
        )  # fmt: skip
        yield from found
        workdir = workdir if found[0].status == OK else None
    together = True
    if _ADDRESS.value is not None:
        for finding in _call_the_roll(config, workdir):
            together &= finding.status == OK or finding.check in APART
            yield finding
        if not together:
            yield skipped("join", "not all are there: JAX would wait, and abort")
    plan = {
        "config": config and config.to_dict(),
        "workdir": workdir,
        "topology": _TOPOLOGY.value,
        "coordinator_address": _ADDRESS.value,
        "num_processes": _PROCESSES.value,
        "process_id": _PROCESS.value,
        "join": together,
        "seconds": round(_WAIT.value),
    }
    command = [sys.executable, "-m", "launch.checks.probe", json.dumps(plan)]
    yield from supervise.watch(command, deadline.left())


def _read_config():
    """The config, after its task has made an example of each split: so its data is reachable."""
    made = []

    def look():
        try:
            made.append(cli.experiment_config(_CONFIG.value))
        except (ConfigError, OSError) as error:
            return [wrong("config", str(error), "mend it, as the message says")]
        config = made[0]
        return [
            ok("config", f"{config.task.name}, pattern {config.model.pattern}, "
               f"N = {config.model.passes}, {config.training.steps} steps of "
               f"{config.training.batch_size} examples")
        ]  # fmt: skip

    findings = within(20, "config", look, "its data does not answer: see where config.task reads")
    return findings, (made[0] if made else None)


def _call_the_roll(config, workdir):
    address, processes, wait = _ADDRESS.value, _PROCESSES.value, _WAIT.value
    facts = software.versions()
    if config is not None:
        text = json.dumps(config.to_dict(), sort_keys=True)
        facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    own = roll_call.card(_PROCESS.value, processes, facts)
    try:
        with contextlib.ExitStack() as stack:
            if own.process == 0:
                host = roll_call.Host(address, processes, wait)
                if workdir is not None:
                    stack.enter_context(folder.marked(workdir, host.token))
                stack.enter_context(host)
            token, roll = roll_call.attend(
                address, own, wait, lambda token: workdir and folder.sees_mark(workdir, token)
            )
            if own.process == 0 and token != host.token:
                yield wrong("coordinator", f"{address} is another machine than that of process 0",
                            "name the machine on which --process_id=0 runs")  # fmt: skip
                return
            yield ok("coordinator", f"{address} answers")
            yield from roll_call.findings(roll, processes)
    except roll_call.RollCallError as error:
        yield wrong("coordinator", error.seen, error.advice)


def _show(finding: Finding):
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(finding)), flush=True)
        return
    label = {OK: "ok", WRONG: "WRONG", SKIPPED: "-"}[finding.status]
    print(f"{label:6}{finding.check:12}{finding.seen}", flush=True)
    if finding.advice:
        print(f"{'':6}{'':12}-> {finding.advice}", flush=True)


if __name__ == "__main__":
    cli.run(main)
