"""A child that looks at the devices, watched: that it hangs or dies is a finding, too."""

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator

from launch.doctor.findings import Deadline, Finding, wrong

# What to do where a stage hangs or dies.
REMEDIES = {
    "start": "run python -c 'import jax' and see what it says",
    "join": "every process that came says this of itself: the others are missing; start all within "
    "a quarter of a minute (--wait)",
    "devices": "another program may hold the devices (on a TPU: lsof /dev/accel* /dev/vfio/*; on a "
    "GPU: nvidia-smi): end it, or restart the machine",
    "exchange": "the machines reach the coordinator, and their devices not each other: see the "
    "firewall between them, and NCCL_SOCKET_IFNAME on GPUs",
    "data": "its files do not answer: see where config.task reads",
    "mesh": "tell us: this is a bug",
    "disk": "the file system does not answer: see its mount",
    "memory": "it is too large to be judged at once: python -m launch.compile takes its time",
}


def watch(command: list[str], seconds: float) -> Iterator[Finding]:
    """The findings of a child that speaks as `launch.doctor.probe`; it ends with us.

    Args:
      seconds: for all of it; each stage names its own limit.
    """
    whole = limit = Deadline(seconds)
    stage, doing = "start", "importing jax"
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            while True:
                left = min(whole.left(), limit.left())
                try:
                    line = lines.get(timeout=left)
                except queue.Empty:
                    yield wrong(stage, f"{doing}: no answer in time", REMEDIES[stage])
                    return
                if line is None:
                    break
                told = _parse(line)
                if "stage" in told:
                    stage, doing = told["stage"], told["doing"]
                    limit = Deadline(told["seconds"])
                elif "finding" in told:
                    yield Finding(**told["finding"])
            if code := child.wait():
                errors.seek(0)
                yield wrong(stage, f"{doing}: {_last_words(errors.read(), code)}", REMEDIES[stage])
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            reader.join()


def _read(stream, lines):
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _parse(line: str) -> dict:
    try:
        told = json.loads(line)
    except ValueError:
        return {}  # some library's word
    return told if isinstance(told, dict) else {}


def _last_words(text: str, code: int) -> str:
    """The line of an error that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("F") and "] " in line]
    errors = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith(" ")]
    said = (fatal or errors or lines or ["it said nothing"])[-1]
    return f"ended with code {code}: {said.split('] ', 1)[-1][-400:]}"
