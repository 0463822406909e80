"""Runs a program as several processes of one run, on this machine: for tests, and for hosts with
several GPUs.

    python -m launch.local_processes --processes=2 --devices=4 -- \\
        python -m launch.train --config=experiments/depo_small.py --workdir=runs/two

Every process gets --coordinator_address, --num_processes and --process_id behind its own arguments.
On CPU --devices virtual devices are made in each; on GPU each process takes so many of the host's.
Signals go to all. When one fails, the others get --grace seconds to end. Exits with the code of the
first that failed.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

from absl import flags

from launch.common import cli
from launch.common.live_line import notify
from launch.common.ports import reserved_port
from sleepnet.config import ConfigError

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", 1, "Of each process.", lower_bound=1)
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "Of the devices.")
_GRACE = flags.DEFINE_float(
    "grace", 30.0, "Seconds that the others get when one has failed.", lower_bound=0.0
)
ABORTED = 128 + signal.SIGABRT
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(argv):
    command = argv[1:]
    if not command:
        raise ConfigError(
            "give the program behind two dashes: -- python -m launch.train --config=..."
        )
    with reserved_port() as port:
        return _run(command, _PROCESSES.value, _DEVICES.value, f"127.0.0.1:{port}")


def _run(command: list[str], count: int, devices: int, address: str) -> int:
    """The exit code of `count` processes that run the command together."""
    print(f"{count} processes x {devices} {_PLATFORM.value} devices, coordinator {address}: "
          f"{shlex.join(command)}", flush=True)  # fmt: skip
    children = [
        subprocess.Popen(
            [*command, *joining(address, count, i)],
            env=os.environ | environment(_PLATFORM.value, devices, i),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C comes once, through us
        )
        for i in range(count)
    ]  # fmt: skip
    for number in FORWARDED:
        signal.signal(number, lambda number, _: _tell(children, number))
    readers = [
        threading.Thread(target=_relay, args=(i, child.stdout)) for i, child in enumerate(children)
    ]
    for reader in readers:
        reader.start()
    code = _wait(children, _GRACE.value)
    for reader in readers:
        reader.join()
    return code


def joining(address: str, processes: int, process_id: int) -> list[str]:
    """The flags by which process `process_id` finds the others; see `launch.common.distributed`."""
    return [
        f"--coordinator_address={address}",
        f"--num_processes={processes}",
        f"--process_id={process_id}",
    ]


def environment(platform: str, devices: int, process_id: int) -> dict[str, str]:
    """What makes a process see its own devices and no others."""
    if platform == "gpu":
        first = process_id * devices
        return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + devices)))}
    asked = f"--xla_force_host_platform_device_count={devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {asked}"}


def _wait(children, grace) -> int:
    """The exit code of all: of the first that failed, 128 + signal if one ended it."""
    code, failed_at = 0, None
    while True:
        codes = [child.poll() for child in children]
        bad = [c if c > 0 else 128 - c for c in codes if c]
        if bad and failed_at is None:
            bad.sort(key=lambda c: c == ABORTED)  # by JAX, because another one had failed
            code, failed_at = bad[0], time.monotonic()
        if None not in codes:
            return code
        if failed_at is not None and time.monotonic() - failed_at > grace:
            stopped = f"a process ended with {code}; the others had {grace:g} s and are stopped now"
            notify(sys.stdout, stopped)
            _tell(children, signal.SIGKILL)
            failed_at = float("inf")
        time.sleep(0.05)


def _tell(children, number):
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _relay(process_id, stream):
    for line in stream:
        notify(sys.stdout, f"[{process_id}] {line}", end="")  # unread, a process would stand still


if __name__ == "__main__":
    cli.run(main, takes_words=True)
