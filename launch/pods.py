"""What the pod experiments would need, compiled for their topologies: `make pods` runs it.

    python -m launch.pods --out=experiments/results [--only=pod_125m] [--quick]

Each row is a `launch.compile` in a process of its own and lies in OUT/pods; one that lies there is
not compiled again, unless it was --quick and now need not be. OUT/PODS.md is written from all.
"""

import dataclasses
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags

from launch import cli
from sleepnet import storage

_OUT = cli.define_path("out", "runs", "Folder for the figures.")
_ONLY = flags.DEFINE_string("only", "", "Only rows whose names contain this.")
_QUICK = flags.DEFINE_bool("quick", False, "Compile with least effort; see `launch.compile`.")


@dataclasses.dataclass(frozen=True)
class Pod:
    """One row: an experiment with what its topology changes."""

    experiment: str
    topology: str
    passes: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.experiment}-{self.topology.replace(':', '-')}-n{self.passes}"

    def command(self, json: pathlib.Path) -> list[str]:
        changes = (f"model.passes={self.passes}", *self.overrides)
        return ["-m", "launch.compile", f"--config=experiments/{self.experiment}.py",
                f"--topology={self.topology}", *(f"--config.{x}" for x in changes),
                f"--json={json}"]  # fmt: skip


PODS = tuple(
    Pod(experiment, topology, passes, overrides)
    for experiment, topology, overrides in (
        ("pod_125m", "v5e:2x4", ()),
        ("pod_1b", "v5e:4x4", ()),
        ("pod_1b", "v5p:2x2x2", ("mesh.fsdp=8",)),
        ("pod_7b", "v5p:4x4x4", ()),
        ("pod_7b", "v5e:16x16", ("mesh.fsdp=256", "training.parts=1")),
    )
    for passes in (1, 4)
)


def main(_):
    from launch.ahead import pods

    out = _OUT.value
    storage.prepare_folder(out / "pods")
    for pod in PODS:
        path = out / "pods" / f"{pod.name}.json"
        if _ONLY.value in pod.name and not _is_done(path):
            _compile(pod, path)
    records = {
        pod.name: storage.read_json(path)
        for pod in PODS
        if (path := out / "pods" / f"{pod.name}.json").exists()
    }
    page = pods.page(records, [pod.name for pod in PODS])
    storage.write_atomic(out / "PODS.md", page)
    print(page)


def _is_done(path: pathlib.Path) -> bool:
    return path.exists() and (_QUICK.value or not storage.read_json(path)["quick"])


def _compile(pod: Pod, path: pathlib.Path):
    with tempfile.TemporaryDirectory() as folder:
        fresh = pathlib.Path(folder) / path.name
        command = [*pod.command(fresh), *(["--quick"] if _QUICK.value else [])]
        print(f"python {' '.join(command)}", flush=True)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False
        )
        if not fresh.exists():  # the other rows are worth compiling all the same
            print(f"failed with exit code {done.returncode}:\n{done.stderr}", flush=True)
            return
        record = storage.read_json(fresh)
    seconds = time.perf_counter() - began
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{done.stdout}\n{seconds:.0f} s, {most / 1e9:.1f} GB\n", flush=True)
    storage.write_json(path, record | {"seconds": seconds})


if __name__ == "__main__":
    cli.run(main)
