"""Runs a command on a slice of Cloud TPU: asks for it, waits, copies the last commit, installs,
runs on all machines, follows the log, fetches results, and gives it back.

    python -m launch.tpu_pod --name=depo --accelerator=v5litepod-16 --zone=us-west4-a --tier=spot \\
        --bucket=BUCKET --resubmit=10 --out=runs/depo --hours=3 [--dry_run] -- \\
        python -m launch.train --config=experiments/depo.py --workdir=/mnt/BUCKET/depo

--dry_run prints every command and what it costs, and judges the run for these chips; it asks for
nothing. Ctrl-C leaves the run alive and says so: the same command follows it again. --down deletes.
Exit codes: 0 done, 1 something failed, 2 the command itself is wrong, or that of the program.
"""

import importlib.util
import pathlib
import signal
import subprocess
import sys

from absl import flags

from launch.common import cli
from launch.common.chips import RUNTIMES, parse_accelerator
from launch.common.live_line import notify
from launch.tpu_pod import commands, gcloud
from launch.tpu_pod.commands import TIERS, Pod
from launch.tpu_pod.life import Life, plan
from sleepnet.config import ConfigError
from sleepnet.config.checks import local_path

_NAME = flags.DEFINE_string("name", None, "Of the request and its machines.", required=True)
_ACCELERATOR = flags.DEFINE_string("accelerator", "v5litepod-16", "Type, as Cloud TPU names it.")
_ZONE = flags.DEFINE_string("zone", None, "Such as us-west4-a.", required=True)
_PROJECT = flags.DEFINE_string("project", None, "By default that of gcloud's configuration.")
_TIER = flags.DEFINE_enum("tier", "on-demand", TIERS, "How it is paid for; spot can be taken away.")
_RUNTIME = flags.DEFINE_string("runtime_version", None, "Image; by default the chip's.")
_BUCKET = flags.DEFINE_string("bucket", None, "Mounted at /mnt/BUCKET on every machine.")
_OUT = cli.define_path("out", None, "Folder here for the results, without checkpoints.")
_HOURS = flags.DEFINE_float("hours", None, "That you expect it to take, to count the cost.")
_RESUBMIT = flags.DEFINE_integer("resubmit", 0, "Times to run it again when cut short.", 0)
_KEEP = flags.DEFINE_bool("keep", False, "Leave the machines when the command has ended.")
_DOCTOR = flags.DEFINE_bool("doctor", True, "Run launch.doctor, here and there, before it.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print all commands and the cost; do nothing.")
_DOWN = flags.DEFINE_bool("down", False, "Delete the machines and the request; nothing else.")


def main(argv):
    pod = _pod(argv[1:])
    life = Life(pod, say=lambda line: notify(sys.stdout, f"-- {line}"))
    for number in (signal.SIGINT, signal.SIGTERM):  # neither leaves anything behind in silence
        signal.signal(number, signal.default_int_handler)
    try:
        if _DOWN.value:
            life.give_back()
            return 0
        print(_cost(pod))
        _warn_of_changes()
        out = _OUT.value
        well = _judge(pod)
        if _DRY_RUN.value:
            for purpose, command in plan(pod, out, keep=_KEEP.value, doctor=_DOCTOR.value):
                print(f"\n# {purpose}\n{gcloud.text(command)}")
            return 0 if well else 1
        if not well:
            raise gcloud.PodError("the run does not fit (above); nothing was asked for")
        return life.live(out, keep=_KEEP.value, resubmit=_RESUBMIT.value, doctor=_DOCTOR.value)
    except gcloud.PodError as error:
        cli.complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _pod(command: list[str]) -> Pod:
    accelerator = parse_accelerator(_ACCELERATOR.value)
    if not command and not _DOWN.value:
        raise ConfigError(
            "give the command behind two dashes: -- python -m launch.train --config=... "
            "--workdir=..."
        )
    if accelerator.hosts > 1 and "--distributed" not in command:
        command = [*command, "--distributed"]
    pod = Pod(
        name=_NAME.value,
        accelerator=accelerator,
        zone=_ZONE.value,
        project=_PROJECT.value,
        runtime=_RUNTIME.value or RUNTIMES[accelerator.kind],
        tier=_TIER.value,
        command=tuple(command),
        bucket=_BUCKET.value and _BUCKET.value.removeprefix("gs://").strip("/"),
    )
    _check_workdir(pod)
    return pod


def _check_workdir(pod: Pod):
    """What must outlive the machines, and be seen by all of them, must lie in the bucket."""
    if _DOWN.value or pod.workdir is None:
        return
    if not pod.workdir.startswith("~"):  # the home of the machines
        try:
            local_path(pod.workdir)
        except ConfigError as error:
            raise ConfigError(f"--workdir={pod.workdir} of the command: {error}") from None
    if pod.bucket is None:
        if _RESUBMIT.value or pod.accelerator.hosts > 1:
            raise ConfigError(
                f"--workdir={pod.workdir} lies on each machine's own disk: give --bucket=BUCKET, "
                f"and a --workdir below /mnt/BUCKET"
            )
    elif not pod.workdir.startswith(f"/mnt/{pod.bucket}/"):
        raise ConfigError(
            f"--workdir={pod.workdir} is outside the bucket; the nearest is "
            f"--workdir=/mnt/{pod.bucket}/{pathlib.PurePath(pod.workdir).name}"
        )


def _cost(pod: Pod) -> str:
    chips, hosts = pod.accelerator.chips, pod.accelerator.hosts
    hours = _HOURS.value
    spent = f"{chips * hours:g} chip-hours" if hours else f"{chips} chip-hours an hour (--hours=H)"
    return (
        f"{pod.accelerator.name} ({pod.accelerator.topology}), {pod.tier}: {chips} chips in "
        f"{hosts} machine(s), {spent}, and some minutes of installing"
    )


def _warn_of_changes():
    changed = gcloud.do(commands.changes())
    if changed:
        print(f"warning: only the last commit is copied; not committed:\n{changed}", flush=True)


def _judge(pod: Pod) -> bool:
    """`launch.doctor`, and for --dry_run `launch.compile`, for the chips that are asked for."""
    given = cli.flags_in(pod.command)
    config = cli.as_flags((name, value) for name, value in given if cli.is_config(name))
    if not config or not _DOCTOR.value:
        return True
    programs = ["launch.doctor"]
    if _DRY_RUN.value and importlib.util.find_spec("libtpu"):
        programs.append("launch.compile")
    elif _DRY_RUN.value:
        print("# no launch.compile: it needs the TPU compiler, pip install -e '.[tpu]'")
    well = True
    for program in programs:
        command = ["python", "-m", program, *config, f"--topology={pod.accelerator.topology}"]
        print(f"\n# {program}, here\n{gcloud.text(command)}", flush=True)
        done = subprocess.run([sys.executable, *command[1:]], check=False)
        well &= done.returncode == 0
    return well


if __name__ == "__main__":
    cli.run(main, takes_words=True)
