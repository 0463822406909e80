"""What the pod experiments would need, compiled for their topologies: `make pods` runs it.

    python -m launch.pods --out=experiments/results [--only=pod_125m] [--quick]

Each row is a `launch.compile` in a process of its own and lies in OUT/pods; one that lies there is
not compiled again, unless its experiment has changed, or it was --quick and now need not be.
OUT/PODS.md is written from all.
"""

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags

from launch.common import cli
from launch.compile.rows import PODS, Pod
from sleepnet import storage

_OUT = cli.define_path("out", "runs", "Folder for the figures.")
_ONLY = flags.DEFINE_string("only", "", "Only rows whose names contain this.")
_QUICK = flags.DEFINE_bool("quick", False, "Compile with least effort; see `launch.compile`.")


def main(_):
    from launch.compile import pods

    out = _OUT.value
    storage.prepare_folder(out / "pods")
    for pod in PODS:
        path = out / "pods" / f"{pod.name}.json"
        if _ONLY.value in pod.name and not pod.is_done(path, _QUICK.value):
            _compile(pod, path)
    records = {
        pod.name: storage.read_json(path)
        for pod in PODS
        if (path := out / "pods" / f"{pod.name}.json").exists()
    }
    page = pods.page(records, [pod.name for pod in PODS])
    storage.write_atomic(out / "PODS.md", page)
    print(page)


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
