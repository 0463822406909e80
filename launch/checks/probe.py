"""What only a process that asks for the devices can see; the doctor runs it as a child.

JAX aborts a process whose peers do not come, and a device that another program holds may never
answer: the child may die or hang, and the doctor says in which stage. Its standard output has a
line of JSON for each stage that begins, and for each finding.
"""

import dataclasses
import json
import socket
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

from launch import chips
from launch.checks import Finding, fit, folder, ok, skipped, wrong
from sleepnet.config import from_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the child is to look at; config None: the devices alone."""

    config: dict[str, Any] | None
    workdir: str | None
    topology: str | None
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    join: bool  # or, where another process is missing, look at this one alone
    seconds: int  # for others to join


def main():
    plan = Plan(**json.loads(sys.argv[1]))
    if plan.join:
        _begin("join", plan.seconds + 5)
        _tell(*_join(plan))
    _begin("devices", 30)
    _tell(*_devices())
    if plan.config is None:
        return
    config = from_dict(plan.config)
    if plan.topology:
        kind, num_devices = chips.parse_topology(plan.topology)
        available = chips.MEMORY[kind]
    else:
        num_devices, available = jax.device_count(), fit.device_memory(jax.local_devices()[0])
        if not plan.join and plan.num_processes:
            num_devices *= plan.num_processes
    _begin("data", 20)
    _tell(*fit.check_data(config))
    _begin("mesh", 10)
    _tell(*fit.check_mesh(config, num_devices))
    if plan.workdir and "://" not in plan.workdir:
        _begin("disk", 20)
        needed = fit.num_bytes(fit.state_shapes(config))
        _tell(*folder.check_room(plan.workdir, needed, config.training.checkpoints_kept))
    _begin("memory", 30)
    _tell(*fit.check_memory(config, num_devices, available))


def _join(plan) -> list[Finding]:
    """JAX's own joining, with the coordinator given or one that JAX finds by itself."""
    try:
        jax.distributed.initialize(
            plan.coordinator_address, plan.num_processes, plan.process_id,
            initialization_timeout=plan.seconds,
        )  # fmt: skip
    except ValueError as error:
        if plan.coordinator_address is None and "coordinator_address" in str(error):
            return [skipped("join", "one process: no coordinator is given, and JAX finds none")]
        return [wrong("join", str(error), "see --coordinator_address, --num_processes and "
                      "--process_id")]  # fmt: skip
    return []


def _devices() -> list[Finding]:
    local = jax.local_devices()
    kinds = ", ".join(sorted({device.device_kind for device in local}))
    found = [
        ok("devices", f"{len(local)} x {kinds} on {socket.gethostname()}, "
           f"{jax.device_count()} in all, process {jax.process_index()} of {jax.process_count()}")
    ]  # fmt: skip
    if jax.process_count() > 1:
        _begin("exchange", 30)
        ids = multihost_utils.process_allgather(jax.numpy.int32(jax.process_index()))
        if sorted(ids.ravel().tolist()) != list(range(jax.process_count())):
            return [*found, wrong("exchange", f"an all-gather gave {ids.tolist()}",
                                  "the network between the devices is broken")]  # fmt: skip
        found.append(ok("exchange", f"an all-gather over {jax.process_count()} processes is right"))
    return found


def _begin(stage: str, seconds: float):
    print(json.dumps({"stage": stage, "seconds": seconds}), flush=True)


def _tell(*findings: Finding):
    for finding in findings:
        print(json.dumps({"finding": dataclasses.asdict(finding)}), flush=True)


if __name__ == "__main__":
    main()
