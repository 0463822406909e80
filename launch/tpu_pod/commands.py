"""Every command of a pod's life, as lists of arguments; `--dry_run` prints these and no others.

Flags as in cloud.google.com/sdk/gcloud/reference/compute/tpus (queued-resources and tpu-vm).
"""

import dataclasses
import pathlib
import shlex

from launch.common import busy, cli
from launch.common.chips import Accelerator

CODE, ENVIRONMENT = "sleepnet", "sleepnet-venv"  # in the home of every machine
LOG, EXIT, PID = "sleepnet.log", "sleepnet.exit", "sleepnet.pid"
PYTHON = "3.12"  # the images have an older one; uv fetches this
TIERS = ("on-demand", "spot", "reserved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    """What is asked for, and what runs on it.

    command: of every machine, in the folder of the code; `python` is that of our environment.
    bucket: mounted at /mnt/BUCKET by gcsfuse; None: nothing outlives the machines.
    """

    name: str
    accelerator: Accelerator
    zone: str
    project: str | None
    runtime: str
    tier: str
    command: tuple[str, ...]
    bucket: str | None = None

    @property
    def workdir(self) -> str | None:
        """--workdir of the command."""
        return dict(cli.flags_in(self.command)).get("workdir")

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def _queued(self, verb: str, *arguments: str) -> list[str]:
        resource = ["gcloud", "compute", "tpus", "queued-resources", verb, self.name]
        return [*resource, *arguments, *self._where()]

    def describe(self) -> list[str]:
        return self._queued("describe", "--format=value(state.state)")

    def create(self) -> list[str]:
        return self._queued(
            "create",
            "--quiet",
            f"--node-id={self.name}",
            f"--accelerator-type={self.accelerator.name}",
            f"--runtime-version={self.runtime}",
            *([] if self.tier == "on-demand" else [f"--{self.tier}"]),
        )

    def delete(self) -> list[str]:
        return self._queued("delete", "--force", "--quiet")

    def node(self) -> list[str]:
        """The state of the machines, which may be PREEMPTED while the request is still ACTIVE."""
        return ["gcloud", "compute", "tpus", "tpu-vm", "describe", self.name,
                "--format=value(state)", *self._where()]  # fmt: skip

    def ssh(self, script: str, worker: str = "all") -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", self.name, f"--worker={worker}",
                f"--command={script}", "--quiet", *self._where()]  # fmt: skip

    def copy(self, archive: pathlib.Path) -> list[str]:
        there = f"{self.name}:{CODE}.tar.gz"
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive), there, "--worker=all",
                "--quiet", *self._where()]  # fmt: skip

    def free_chips(self) -> list[str]:
        """End what an earlier command left in the folder of the code, where it holds the chips."""
        return self.ssh(busy.free(CODE))

    def who_holds_chips(self) -> list[str]:
        """Print, on machines where the command found its chips held, which processes hold them."""
        return self.ssh(busy.tell(CODE, LOG))

    def unpack(self) -> list[str]:
        return self.ssh(f"rm -rf {CODE} && mkdir {CODE} && tar -xzf {CODE}.tar.gz -C {CODE}")

    def install(self) -> list[str]:
        python = f"$HOME/{ENVIRONMENT}/bin/python"
        return self.ssh(
            f"cd {CODE} && python3 -m pip install --quiet --user uv && "
            f"python3 -m uv venv --quiet --allow-existing --python {PYTHON} "
            f"$HOME/{ENVIRONMENT} && "
            f"python3 -m uv pip install --quiet --python {python} "
            f"--constraint .ci/constraints-{PYTHON}.txt --editable '.[tpu]'"
        )

    def mount(self) -> list[str]:
        at = f"/mnt/{self.bucket}"
        return self.ssh(
            f"mountpoint -q {at} || {{ sudo mkdir -p {at} && sudo chown $USER {at} && "
            f"gcsfuse --implicit-dirs {self.bucket} {at}; }}"
        )

    def doctor(self) -> list[str]:
        """`launch.doctor` with what it takes of the command."""
        taken = cli.as_flags(
            (name, value) for name, value in cli.flags_in(self.command)
            if cli.is_config(name) or name in ("workdir", "distributed")
        )  # fmt: skip
        return self.ssh(self._inside(["python", "-m", "launch.doctor", *taken]))

    def start(self) -> list[str]:
        """Starts the command everywhere, and returns: it outlives this connection."""
        run = f"{self._inside(self.command)} > $HOME/{LOG} 2>&1; echo $? > $HOME/{EXIT}"
        return self.ssh(
            f"rm -f {EXIT} {LOG}; nohup sh -c {shlex.quote(run)} < /dev/null > /dev/null 2>&1 & "
            f"echo $! > {PID}"
        )

    def status(self, worker: str = "0") -> list[str]:
        """Of the command, a line for a machine: "running", "ended CODE" or "free"."""
        return self.ssh(
            f"if test -e {PID} && kill -0 $(cat {PID}) 2> /dev/null; then echo running; "
            f"elif test -e {EXIT}; then echo ended $(cat {EXIT}); else echo free; fi",
            worker,
        )

    def follow(self) -> list[str]:
        """The log of process 0, until it ends."""
        script = f"touch {LOG}; tail -n +1 -F --pid=$(cat {PID}) {LOG} 2> /dev/null"
        return self.ssh(script, worker="0")

    def last_words(self) -> list[str]:
        return self.ssh(f'echo "$(hostname): exit code $(cat {EXIT})"; tail -n 20 {LOG}')

    def fetch(self, out: pathlib.Path) -> list[str]:
        """All of the workdir but its checkpoints; without a bucket, all of it."""
        if self.bucket and self.workdir and self.workdir.startswith(f"/mnt/{self.bucket}/"):
            source = "gs://" + self.workdir.removeprefix("/mnt/")
            return ["gcloud", "storage", "rsync", "--recursive", "--exclude=checkpoints/.*",
                    source, str(out)]  # fmt: skip
        source = self.workdir or ""
        source = source if source.startswith(("/", "~")) else f"{CODE}/{source}"
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", f"{self.name}:{source}", str(out),
                "--recurse", "--worker=0", "--quiet", *self._where()]  # fmt: skip

    def _inside(self, command) -> str:
        # Of chips that it cannot have JAX would else say nothing, and compute on the CPU.
        where = f"JAX_PLATFORMS=tpu,cpu PATH=$HOME/{ENVIRONMENT}/bin:$PATH"
        return f"cd $HOME/{CODE} && {where} {shlex.join(command)}"


def archive(out: pathlib.Path) -> list[str]:
    """The last commit; what is not committed is left out."""
    return ["git", "archive", "--format=tar.gz", f"--output={out}", "HEAD"]


def changes() -> list[str]:
    return ["git", "status", "--porcelain", "--untracked-files=no"]
