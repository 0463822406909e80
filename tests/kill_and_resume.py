"""Kills training with SIGKILL at random moments, resumes it each time, and compares the ends.

    python tests/kill_and_resume.py --kills=200 --processes=1 [--out=kills.json]

First a run that nobody disturbs. Then chains of lives: each life of a run is killed at a random
moment of a random phase (of a random process or of all, if there are several; the others follow),
and the next one resumes it, until a life reaches the end. Then parameters, optimizer state and rows
of metrics must be those of the undisturbed run, bit for bit; and a new chain begins, until there
were as many kills as asked. Some lives compile anew, so that XLA is killed at work, too. A step
holds the sleeps of its windows, so that kills in "step" are kills in sleep.

To begin a life cheaply, this process imports everything, asks for no device, and forks; and most
lives load the executables that the first one compiled, instead of tracing what is in XLA's cache.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.experimental import serialize_executable

from launch.common.ports import reserved_port
from sleepnet import storage
from sleepnet.config import ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training import held_out, loop
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.metrics import METRICS
from sleepnet.training.multihost import STOP
from sleepnet.training.program import Program
from sleepnet.training.step import state_shapes

CONFIG = ExperimentConfig(
    model=ModelConfig(vocab_size=6, pattern="G", d_model=8, num_heads=1, window=4, passes=2),
    task=DepoConfig(nodes=4, symbols=4, hops=2, queries=2, window=4, test_fraction=0.5),
    training=TrainingConfig(
        steps=60, batch_size=8, log_every=2, checkpoint_every=6, evaluate_every=10,
        evaluate_examples=24, best_kept=1, spike_factor=100.0, spike_window=8,
    ),
)  # fmt: skip
METRICS_OF_STEP = ("loss", "accuracy", "grad_norm", "bad", "bad_so_far", "bad_in_a_row", STOP)
RETURNED = {
    "training step": lambda state, *_: (state, dict.fromkeys(METRICS_OF_STEP, 0)),
    "held-out measurement": lambda *_: ((), dict.fromkeys(("nll", "right", "scored", STOP), 0)),
}
PHASES = ("restore", "save", "compile", "data", "step", "evaluate")
MOMENTS = {"restore": 1, "compile": 1, "save": 4, "evaluate": 6}  # times that a phase is met: ..
AT_MOST = 30  # of the others
ANEW = 0.1  # share of lives that trace and compile all
LIFE_SECONDS = 600  # a life that takes longer is stuck


class Remembered(Program):
    """A program that an earlier life has compiled, and kept in `folder`."""

    folder: pathlib.Path

    def _compile(self, arguments):
        returned = jax.tree.structure(RETURNED[self._name](*arguments))
        file = self.folder / f"{self._name}-{jax.process_index()}-of-{jax.process_count()}"
        if file.exists():
            taken = jax.tree.structure((arguments, {}))
            return serialize_executable.deserialize_and_load(file.read_bytes(), taken, returned)
        compiled = super()._compile(arguments)
        executable, _, tree = serialize_executable.serialize(compiled)
        assert tree == returned, "RETURNED is out of date"
        storage.write_atomic(file, executable)
        return compiled


class Life:
    """Forked processes that train in a workdir, and tell of their phases."""

    def __init__(self, workdir, processes, cache, log, anew=False):
        self.processes, self.phase, self._log = {}, None, log
        self._held = contextlib.ExitStack()  # until all have ended
        port = self._held.enter_context(reserved_port())
        signal.signal(signal.SIGALRM, self._give_up)
        signal.alarm(LIFE_SECONDS)
        reader, writer = os.pipe()
        for index in range(processes):
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _live(workdir, index, processes, port, cache, log, writer, anew)
            self.processes[index] = pid
        os.close(writer)
        self._phases = os.fdopen(reader)

    def phases(self):
        """The phases of the first process as they begin, until it ends."""
        for line in self._phases:
            self.phase = line.strip()
            yield self.phase

    def kill(self, victims):
        """SIGKILL to some, and then to all."""
        for index in victims:
            os.kill(self.processes[index], signal.SIGKILL)
        if len(victims) < len(self.processes):
            time.sleep(random.uniform(0, 0.5))
        for pid in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for phase in self._phases:  # what it told before it died
            self.phase = phase.strip()
        self.wait()

    def wait(self):
        """Exit codes of all; kills are negative."""
        self._phases.close()
        pids = self.processes.values()
        with self._held:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        signal.alarm(0)
        return codes

    def _give_up(self, *_):
        for pid in self.processes.values():
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"a life did not end in {LIFE_SECONDS} s: see {self._log}")


def _live(workdir, index, processes, port, cache, log, phases, anew):
    """The whole life of a forked process."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if cache.exists():  # what XLA's cache has given cannot be serialized whole
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if not anew:
            cache.mkdir(exist_ok=True)
            Remembered.folder = cache
            loop.Program = held_out.Program = Remembered
        if processes > 1:
            jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)

        def tell(phase, _):
            if index == 0:
                os.write(phases, f"{phase}\n".encode())

        loop.train(CONFIG, workdir, on_phase=tell, on_notice=lambda text: print(text, flush=True))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def undisturbed(workdir, processes, cache, log):
    """Trains to the end; median seconds of each phase."""
    life = Life(workdir, processes, cache, log)
    began, durations = {}, collections.defaultdict(list)
    last = None
    for phase in life.phases():
        now = time.monotonic()
        if last is not None:
            durations[last].append(now - began[last])
        last, began[phase] = phase, now
    if any(life.wait()):
        sys.exit(f"the undisturbed run failed: see {log}")
    return {phase: statistics.median(times) for phase, times in durations.items()}


def killed_once(workdir, processes, cache, log, seconds, dice):
    """One life; the phase in which it was killed, or None if it reached the end before."""
    target = dice.choice(PHASES)
    meeting = dice.randint(1, MOMENTS.get(target, AT_MOST))
    # A life that resumes is quicker than the first one: early moments come more often.
    delay = 1.2 * seconds[target] * dice.random() ** 2
    victims = range(processes) if dice.random() < 0.5 else [dice.randrange(processes)]
    anew = dice.random() < ANEW
    if anew:
        cache = pathlib.Path(tempfile.mkdtemp(dir=workdir.parent))
        target, meeting, delay = "compile", 1, dice.uniform(0, 4.0)
    life = Life(workdir, processes, cache, log, anew)
    for phase in life.phases():
        meeting -= phase == target
        if phase == target and meeting == 0:
            time.sleep(delay)
            life.kill(victims)
            break
    else:
        codes = life.wait()
        if any(codes):
            sys.exit(f"a life ended by itself with {codes}: see {log}")
        life.phase = None
    if anew:
        shutil.rmtree(cache)
    return life.phase


def differences(workdir, reference, log):
    """What is not bit-equal between two finished runs, found out in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        with os.fdopen(writer, "w") as file:
            json.dump(list(_differences(workdir, reference)), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = file.read()
    os.waitpid(pid, 0)
    return json.loads(found) if found else ["they cannot be compared"]


def _differences(workdir, reference):
    if (workdir / METRICS).read_bytes() != (reference / METRICS).read_bytes():
        yield f"{METRICS} of {workdir}"
    like = state_shapes(CONFIG, mesh=None)
    states = []
    for folder in (workdir, reference):
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            state, warnings = checkpoints.restore_latest(like)
        yield from warnings
        states.append(jax.tree_util.tree_leaves_with_path(jax.device_get(state)))
    for (path, a), (_, b) in zip(*states, strict=True):
        if not np.array_equal(a, b) or np.asarray(a).dtype != np.asarray(b).dtype:
            yield f"{jax.tree_util.keystr(path)} of {workdir}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for what was found")
    parser.add_argument("--cache", type=pathlib.Path, help="compiled programs, to begin sooner")
    given = parser.parse_args()
    dice = random.Random(given.seed)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    cache = given.cache or folder / "cache"
    log, reference = folder / "log.txt", folder / "reference"
    began = time.monotonic()
    undisturbed(folder / "first", given.processes, cache, log)  # fills the cache
    seconds = undisturbed(reference, given.processes, cache, log)
    wrong = differences(folder / "first", reference, log)
    by_phase, chains = collections.Counter(), 0
    while sum(by_phase.values()) < given.kills and not wrong:
        workdir = folder / f"chain-{chains}"
        while phase := killed_once(workdir, given.processes, cache, log, seconds, dice):
            by_phase[phase] += 1
        wrong = differences(workdir, reference, log)
        chains += 1
        print(
            f"{sum(by_phase.values())} kills, {chains} runs ended, {time.monotonic() - began:.0f} s"
            f", {dict(by_phase)}: {wrong or 'all bit-equal'}", flush=True,
        )  # fmt: skip
        if not wrong:
            shutil.rmtree(workdir)
    found = {
        "kills": sum(by_phase.values()), "by_phase": by_phase, "runs": chains,
        "processes": given.processes, "seed": given.seed, "steps": CONFIG.training.steps,
        "seconds": round(time.monotonic() - began), "wrong": wrong,
    }  # fmt: skip
    print(json.dumps(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")
    if wrong:
        sys.exit(f"not bit-equal; the runs lie in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
