"""Other implementations of the local rule, each in a process and an environment of its own.

They never share a process with ours: their libraries bring other versions and thread pools.
`make peers` builds the environments.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile

import numpy as np

# What each is called, and whose environment it runs in.
PEERS = {"transformers": "transformers", "ejkernel": "ejkernel"}
TOLERANCE = 1e-3  # of the largest value: another order of float32 sums
_SERVE = pathlib.Path(__file__).with_name("serve.py")


class PeerError(RuntimeError):
    """A peer that cannot be started, disagrees or has died; the message names it."""


@contextlib.contextmanager
def start(name: str, environments: pathlib.Path, threads: int):
    """The running peer; it ends with the context."""
    python = environments / PEERS[name] / "bin" / "python"
    if not python.exists():
        raise PeerError(f"peer {name} has no environment at {python}; `make peers` builds it")
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(name, [str(python), str(_SERVE), f"of_{name}"], pathlib.Path(folder), threads)
        try:
            yield peer
        finally:
            peer.close()


class Peer:
    """Speaks with a process by lines of JSON; arrays go through files."""

    def __init__(self, name, command, folder: pathlib.Path, threads: int):
        self.name, self._folder = name, folder
        self._errors = folder / "stderr"
        limits = {"NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=os.environ | limits, text=True,
            )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.versions: dict[str, str] = self._answer()["versions"]

    def load(self, inputs: dict[str, np.ndarray]):
        path = self._folder / "inputs.npz"
        np.savez(path, **inputs)  # pyright: ignore[reportArgumentType]
        self._ask(load=str(path))

    def run(self, work: str) -> float:
        """Milliseconds of one call, by the peer's own clock."""
        return self._ask(run=work)["ms"]

    def check(self, work: str, reference: dict[str, np.ndarray]):
        """Raises PeerError where the peer's results are not those of `reference`."""
        path = self._folder / "results.npz"
        self._ask(save=work, to=str(path))
        with np.load(path) as results:
            for key, ours in reference.items():
                difference = np.max(np.abs(results[key] - ours)) / np.max(np.abs(ours))
                if not difference <= TOLERANCE:
                    raise PeerError(
                        f"peer {self.name} computes something else: {key} of {work} differs by "
                        f"{difference:.1e} of its largest value, allowed is {TOLERANCE:.0e}"
                    )

    def close(self):
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request):
        try:
            self._requests.write(json.dumps(request, allow_nan=False) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            pass  # it has died; reading says so
        return self._answer()

    def _answer(self):
        line = self._answers.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        last = self._errors.read_text().strip().splitlines()[-1:] or ["without a word"]
        raise PeerError(f"peer {self.name} died with exit code {code}: {last[0]}")
