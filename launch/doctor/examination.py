"""All that the doctor looks at, in the order in which one thing rests on another."""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator

from launch.doctor import folder, roll_call, software, supervise
from launch.doctor.clusters import Cluster, detect
from launch.doctor.findings import OK, Deadline, Finding, ok, skipped, within, wrong
from sleepnet import strict_json
from sleepnet.config import ConfigError
from sleepnet.experiment import ExperimentConfig

SECONDS = 50.0  # for all that is looked at, beside the wait for other processes
PATIENCE = 15.0
APART = ("alike", "shared", "clocks")  # checks of the roll that do not keep JAX from joining


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What is to be looked at.

    config: makes the config, or raises ConfigError; None: none was named.
    cluster: None: this process alone, or, with `detect`, one that JAX finds by itself.
    topology: of the TPUs that mesh and memory are judged for; None: the devices here.
    wait: seconds for other processes to come.
    seconds: for all that is looked at; each look may take its share of them.
    """

    config: Callable[[], ExperimentConfig] | None = None
    workdir: str | None = None
    cluster: Cluster | None = None
    detect: bool = False
    topology: str | None = None
    wait: float = PATIENCE
    seconds: float = SECONDS


def examine(launch: Launch) -> Iterator[Finding]:
    """Findings, one by one; none hangs, and all end within `Launch.seconds`, unless told to wait
    longer.

    Where other processes are missing, this one is still looked at, as if they had its devices.
    """
    deadline = Deadline(launch.seconds + max(0.0, 2 * (launch.wait - PATIENCE)))
    pace = launch.seconds / SECONDS
    yield from software.check()
    findings, config = _read_config(launch.config, min(20.0 * pace, deadline.left()))
    yield from findings
    findings, workdir = _try_workdir(launch.workdir, min(10.0 * pace, deadline.left()))
    yield from findings
    findings, cluster = _find_cluster(launch, deadline.left())
    yield from findings
    together = True
    if cluster is not None:
        findings = within(
            deadline.left(), "coordinator",
            lambda: call_the_roll(cluster, config, workdir, launch.wait),
            f"the name of {cluster.coordinator_address} or the workdir does not answer: see DNS, "
            f"and the mount",
        )  # fmt: skip
        yield from findings
        together = all(found.status == OK or found.check in APART for found in findings)
        if not together:
            yield skipped("join", "not all are there: JAX would wait, and abort")
    plan = {
        "config": config and config.to_dict(),
        "workdir": workdir,
        "topology": launch.topology,
        "cluster": cluster and cluster._asdict(),
        "join": together and (launch.detect or cluster is not None),
        "wait": round(launch.wait),
        "pace": pace,
        "facts": _facts(config),
    }
    command = [sys.executable, "-m", "launch.doctor.probe", strict_json.dumps(plan)]
    yield from supervise.watch(command, deadline.left())


def _read_config(make, seconds: float) -> tuple[list[Finding], ExperimentConfig | None]:
    """The config, after its task has made an example of each split: so its data is reachable."""
    if make is None:
        why = "no --config: data, mesh, memory and disk are not judged"
        return [skipped("config", why)], None
    made = []

    def look():
        try:
            config = make()
        except (ConfigError, OSError) as error:
            return [wrong("config", str(error), "mend it, as the message says")]
        made.append(config)
        about = (
            f"{config.task.name}, pattern {config.model.pattern}, N = {config.model.passes}, "
            f"{config.training.steps} steps of {config.training.batch_size} examples"
        )
        return [ok("config", about)]

    advice = "its data does not answer: see where config.task reads"
    findings = within(seconds, "config", look, advice)
    return findings, (made[0] if made else None)


def _try_workdir(workdir: str | None, seconds: float) -> tuple[list[Finding], str | None]:
    """The workdir comes back where it can be used."""
    if workdir is None:
        return [skipped("workdir", "no --workdir")], None
    advice = "the file system does not answer: see its mount, or name another --workdir"
    findings = within(seconds, "workdir", lambda: folder.check(workdir), advice)
    return findings, (workdir if findings[0].status == OK else None)


def _find_cluster(launch: Launch, seconds: float) -> tuple[list[Finding], Cluster | None]:
    """The cluster that was named, or else one that JAX finds, where it tells."""
    if launch.cluster is not None or not launch.detect:
        return [], launch.cluster
    found = []

    def look():
        found.append(detect(launch.wait))
        return []

    advice = "what tells JAX of its cluster does not answer: on Cloud TPU, the metadata server"
    findings = within(seconds, "coordinator", look, advice)
    return findings, (found[0] if found else None)


def call_the_roll(cluster: Cluster, config, workdir, wait: float) -> Iterator[Finding]:
    """Who is there, of the same launch, with the same workdir (if one is named) and time."""
    address, processes = cluster.coordinator_address, cluster.num_processes
    own = roll_call.card(cluster.process_id, processes, _facts(config))
    try:
        with contextlib.ExitStack() as stack:
            host = roll_call.Host(address, processes, wait) if own.process == 0 else None
            if host is not None:
                if workdir is not None:
                    stack.enter_context(folder.marked(workdir, host.token))
                stack.enter_context(host)
            token, roll = roll_call.attend(
                address, own, wait, lambda token: workdir and folder.sees_mark(workdir, token)
            )
            if host is not None and token != host.token:
                seen = f"{address} is another machine than that of process 0"
                yield wrong("coordinator", seen, "name the machine that runs --process_id=0")
                return
            yield ok("coordinator", f"{address} answers")
            yield from roll_call.findings(roll, processes)
    except roll_call.RollCallError as error:
        yield wrong("coordinator", error.seen, error.advice)


def _facts(config) -> dict[str, str]:
    """What must be the same in every process."""
    facts = software.versions()
    if config is not None:
        text = strict_json.dumps(config.to_dict(), sort_keys=True)
        facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return facts
