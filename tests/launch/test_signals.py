"""Signals are heard in every phase: the program ends with 128 + signal, and nothing is lost."""

import json
import os
import signal
import sys

import pytest
import waiting

from sleepnet.storage import write_atomic
from sleepnet.training.workdir import load_config, load_params

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
COMPILED = waiting.ROOT / ".pytest_cache" / "signals"
# Calls that stay in C, as XLA's compiler does; "ready" once the first one keeps a core busy.
BUSY = """
import hashlib, threading, time
from launch.common.signals import Signals
signals = Signals()
signals.has_nothing_to_save({nothing})
clock = time.pthread_getcpuclockid(threading.get_ident())
def tell(began):
    while time.clock_gettime(clock) < began + 0.05:
        time.sleep(0.01)
    print("ready", flush=True)
threading.Thread(target=tell, args=(time.clock_gettime(clock),), daemon=True).start()
while not signals.asked():
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
print("stopping", flush=True)
raise SystemExit(128 + signals.received)
"""
ENDLESS, SHORT = 10**9, 3 * 10**5  # rounds
TRAIN = [
    "--config=experiments/depo_small.py", "--config.model.pattern=G", "--config.model.d_model=8",
    "--config.model.passes=2", "--config.model.unroll=False", "--config.mesh.data=1",
    "--config.training.steps=100000", "--config.training.batch_size=2",
    "--config.training.log_every=1",
]  # fmt: skip
# A heartbeat comes several times a second. What is compiled takes long, and so does what is held
# out: whoever waits for the end of one of them does not end before the test gives up.
OFTEN = ["--config.training.stall_seconds=1"]
PHASES = {
    "compile": ["--config.model.pattern=GGGG", "--config.model.passes=16",
                "--config.model.unroll=True"],
    "step": [],
    "evaluate": ["--config.training.evaluate_every=1",
                 "--config.training.evaluate_examples=1000000000"],
}  # fmt: skip


def start(*command):
    return waiting.Program(sys.executable, *command)


def busy(nothing, rounds):
    program = start("-c", BUSY.format(nothing=nothing, rounds=rounds))
    program.output.until("ready\n")
    return program


@pytest.mark.parametrize("number", SIGNALS)
def test_with_nothing_to_save_it_ends_at_once_even_in_a_call_that_does_not_return(number):
    program = busy(nothing=True, rounds=ENDLESS)
    program.send(number)
    done = program.end()
    assert done.returncode == 128 + number
    assert f"{number.name}: ended at once" in done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_with_something_to_save_the_program_is_asked_to_stop(number):
    program = busy(nothing=False, rounds=SHORT)
    program.send(number)
    done = program.end()
    assert (done.returncode, done.stdout) == (128 + number, "ready\nstopping\n")


def test_a_second_signal_ends_it_at_once():
    program = busy(nothing=False, rounds=ENDLESS)
    program.send(signal.SIGTERM)
    program.errors.until("SIGTERM: stopping after this step")
    program.send(signal.SIGINT)
    done = program.end()
    assert done.returncode == 128 + signal.SIGINT and "SIGINT: ended at once" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_training_stops_where_it_is_and_leaves_a_checkpoint(phase, number, tmp_path):
    """While XLA compiles (with no compiled programs at hand), steps and evaluates."""
    cache = tmp_path / "cache" if phase == "compile" else COMPILED
    program = start(
        "-m", "launch.train", *TRAIN, *OFTEN, *PHASES[phase], f"--workdir={tmp_path / 'run'}",
        f"--compilation_cache={cache}",
    )  # fmt: skip
    waiting.until(lambda: heartbeat(tmp_path / "run")["phase"] == phase, phase, program)
    program.send(number)
    done = program.end()
    assert done.returncode == 128 + number, done.stderr
    _, step = load_params(tmp_path / "run")
    if phase == "compile":
        assert step == 0 and "ended at once" in done.stderr
    else:
        assert step >= 1 and f"stopped at step {step} and saved" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_one_process_that_is_signalled_stops_all_at_one_step(process, tmp_path):
    """Two processes of one run; the signal comes to either alone."""
    program = start(
        "-m", "launch.local_processes", "--processes=2", "--", sys.executable,
        "-m", "launch.train", *[x for x in TRAIN if "mesh" not in x], *OFTEN,
        f"--workdir={tmp_path / 'run'}", f"--compilation_cache={COMPILED}",
    )  # fmt: skip
    program.output.until("step 1/")  # of notices and rows of both
    pid = waiting.until(lambda: heartbeat(tmp_path / "run", process)["pid"], "a heartbeat", program)
    os.kill(pid, signal.SIGUSR1)
    done = program.end()
    _, step = load_params(tmp_path / "run")
    assert f"[{process}] stopped at step {step} and saved" in done.stdout, done.stderr
    assert f"[{1 - process}] stopped with another process at step {step} and saved" in done.stdout
    assert done.returncode in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_leaves_the_one_before(tmp_path):
    """Exit code 128 + signal, and evaluation.json is what it was."""
    workdir = tmp_path / "run"
    one_step = ["--config.training.steps=1", "--config.training.warmup_steps=0"]
    trained = start("-m", "launch.train", *TRAIN, *one_step, f"--workdir={workdir}").end()
    assert trained.returncode == 0 and load_config(workdir), trained
    write_atomic(workdir / "evaluation.json", "what was measured before")
    program = start("-m", "launch.evaluate", f"--workdir={workdir}", "--examples=1000000")
    program.output.until("with N = ")
    program.send(signal.SIGTERM)
    assert program.end().returncode == 128 + signal.SIGTERM
    assert (workdir / "evaluation.json").read_text() == "what was measured before"
    assert not list(workdir.glob(".evaluation*"))


def heartbeat(workdir, process=0):
    """The last one of a process; nothing in it where none has come yet."""
    path = workdir / "heartbeats" / f"{process}.json"
    if path.exists():
        return json.loads(path.read_text())
    return {"phase": None, "pid": None}
