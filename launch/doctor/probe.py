"""What only a process that asks for the devices can see; the doctor runs it as a child.

JAX aborts a process whose peers do not come, and a device that another program holds may never
answer: the child may die or hang, and the doctor says in which stage. Its standard output has a
line of JSON for each stage that begins, and for each finding. Its argument is a dictionary in JSON:
config, workdir and topology, or null; cluster, the arguments of `jax.distributed.initialize`, or
null; join, or else look at this process alone; wait, the seconds for others to join; pace, by which
the seconds of every other stage are multiplied; facts, of this process's card.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch.common import chips
from launch.doctor import fit, folder, roll_call
from launch.doctor.findings import Finding, ok, wrong
from launch.doctor.roll_call import Card
from sleepnet.experiment import from_dict
from sleepnet.training.step import state_shapes

LONGEST = 2048  # bytes of a card


def main():
    plan = json.loads(sys.argv[1])
    pace = plan["pace"]
    if plan["join"]:
        _begin("join", plan["wait"] + 5, f"{_who()} waits for the others to join")
        _tell(*_join(plan["cluster"] or {}, plan["wait"]))
    _begin("devices", 30 * pace, "asking for the devices")
    _tell(*_devices())
    if jax.process_count() > 1:
        _begin("exchange", 30 * pace, "an all-gather over all processes")
        _tell(*_exchange(plan))
    if plan["config"] is None:
        return
    config = from_dict(plan["config"])
    num_devices, available = _judged_for(plan)
    _begin("data", 20 * pace, "making an example")
    _tell(*fit.check_data(config))
    _begin("mesh", 10 * pace, "fitting the mesh")
    _tell(*fit.check_mesh(config, num_devices))
    if plan["workdir"] is not None:
        _begin("disk", 20 * pace, "counting what checkpoints take")
        needed = fit.num_bytes(state_shapes(config, None))
        _tell(*folder.check_room(plan["workdir"], needed, config.training.checkpoints_kept))
    _begin("memory", 30 * pace, "estimating a step")
    _tell(*fit.check_memory(config, num_devices, available))


def _who() -> str:
    """This process, as its cluster calls it; JAX has no name for it before all have joined."""
    task, tasks, worker = map(os.environ.get, ("SLURM_PROCID", "SLURM_NTASKS", "TPU_WORKER_ID"))
    host = socket.gethostname()
    if task is not None:
        return f"task {task} of {tasks} of Slurm, on {host},"
    return f"worker {worker}, on {host}," if worker is not None else host


def _judged_for(plan: dict[str, Any]) -> tuple[int, int]:
    """How many devices, and the bytes of memory of each."""
    if plan["topology"] is not None:
        kind, num_devices = chips.parse_topology(plan["topology"])
        return num_devices, round(chips.CHIPS[kind].hbm)
    num_devices = jax.device_count()
    if plan["cluster"] and not plan["join"]:  # alone, though others belong to it
        num_devices *= plan["cluster"]["num_processes"]
    return num_devices, fit.device_memory(jax.local_devices()[0])


def _join(cluster: dict[str, Any], wait: int) -> list[Finding]:
    """JAX's own joining, with the coordinator that was given or one that JAX finds by itself."""
    try:
        jax.distributed.initialize(**cluster, initialization_timeout=wait)
    except ValueError as error:
        lost = "JAX finds no cluster here by itself" if not cluster else str(error)
        return [wrong("join", lost, "see --coordinator_address, --num_processes and --process_id")]
    return []


def _devices() -> list[Finding]:
    local = jax.local_devices()
    kinds = ", ".join(sorted({device.device_kind for device in local}))
    found = [
        ok("devices", f"{len(local)} x {kinds} on {socket.gethostname()}, "
           f"{jax.device_count()} in all, process {jax.process_index()} of {jax.process_count()}")
    ]  # fmt: skip
    return found


def _exchange(plan: dict[str, Any]) -> list[Finding]:
    """Whether the processes reach each other's devices; and, where JAX found them and no roll was
    called, what the roll call would have told."""
    index, count = jax.process_index(), jax.process_count()
    with contextlib.ExitStack() as stack:
        token = secrets.token_hex(8)
        if index == 0 and plan["workdir"] is not None:
            stack.enter_context(folder.marked(plan["workdir"], token))
        token = _gather(token)[0]
        sees = plan["workdir"] and folder.sees_mark(plan["workdir"], token)
        own = dataclasses.replace(roll_call.card(index, count, plan["facts"]), sees=sees)
        multihost_utils.sync_global_devices("all tell their time at once")
        own = dataclasses.replace(own, clock=time.time())
        roll = [Card(**json.loads(text)) for text in _gather(_line(dataclasses.asdict(own)))]
    if [card.process for card in roll] != list(range(count)):
        seen = f"an all-gather brought the cards of {[card.name for card in roll]}"
        return [wrong("exchange", seen, "the network between the devices is broken")]
    found = [ok("exchange", f"an all-gather over {count} processes is right")]
    if plan["cluster"] is None:
        first = roll[0].clock
        roll = [dataclasses.replace(card, clock=card.clock - first) for card in roll]
        found += roll_call.findings(roll, count)
    return found


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    mine = np.zeros(LONGEST, np.uint8)
    data = text.encode()
    mine[: len(data)] = list(data)
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(mine)]


def _begin(stage: str, seconds: float, doing: str):
    print(_line({"stage": stage, "seconds": seconds, "doing": doing}), flush=True)


def _tell(*findings: Finding):
    for finding in findings:
        print(_line({"finding": dataclasses.asdict(finding)}), flush=True)


def _line(value) -> str:
    return json.dumps(value, allow_nan=False)


if __name__ == "__main__":
    main()
