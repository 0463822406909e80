"""Signals are heard in every phase: the program ends with 128 + signal, and nothing is lost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sleepnet.storage import write_atomic
from sleepnet.training.workdir import load_config, load_params

ROOT = pathlib.Path(__file__).parent.parent.parent
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
GRACE = 30.0  # seconds, of preempted machines
# A call that stays in C for minutes, as XLA's compiler does.
BUSY = """
import hashlib
from launch.signals import Signals
signals = Signals()
signals.has_nothing_to_save({nothing})
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
print("stopping" if signals.asked() else "not asked", flush=True)
raise SystemExit(128 + signals.received)
"""
TRAIN = [
    "--config=experiments/depo_small.py", "--config.model.pattern=G", "--config.model.d_model=8",
    "--config.model.passes=2", "--config.model.unroll=False", "--config.mesh.data=1",
    "--config.training.steps=100000", "--config.training.batch_size=2",
    "--config.training.log_every=1",
]  # fmt: skip
PHASES = {
    "compile": [],
    "step": [],
    "evaluate": [
        "--config.training.evaluate_every=1", "--config.training.evaluate_examples=1000000",
    ],
}  # fmt: skip


def start(*command, **kwargs):
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **kwargs,
    )  # fmt: skip


def busy(nothing, rounds):
    program = start("-c", BUSY.format(nothing=nothing, rounds=rounds))
    assert program.stdout.readline() == "ready\n"
    return program


@pytest.mark.parametrize("number", SIGNALS)
def test_with_nothing_to_save_it_ends_at_once_even_in_a_call_that_does_not_return(number):
    program = busy(nothing=True, rounds=10**9)
    time.sleep(0.1)
    program.send_signal(number)
    _, errors = program.communicate(timeout=10)
    assert program.returncode == 128 + number
    assert f"{number.name}: ended at once" in errors


@pytest.mark.parametrize("number", SIGNALS)
def test_with_something_to_save_the_program_is_asked_to_stop(number):
    program = busy(nothing=False, rounds=2 * 10**6)
    time.sleep(0.1)
    program.send_signal(number)
    output, _ = program.communicate(timeout=60)
    assert (program.returncode, output) == (128 + number, "stopping\n")


def test_a_second_signal_ends_it_at_once():
    program = busy(nothing=False, rounds=10**9)
    for number in (signal.SIGTERM, signal.SIGINT):
        time.sleep(0.2)
        program.send_signal(number)
    program.communicate(timeout=10)
    assert program.returncode == 128 + signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_training_leaves_a_checkpoint_within_the_grace_time(phase, number, tmp_path):
    """While XLA compiles (with no compiled programs at hand), steps and evaluates."""
    cache = tmp_path / "cache" if phase == "compile" else ROOT / ".pytest_cache" / "signals"
    program = start(
        "-m", "launch.train", *TRAIN, *PHASES[phase], f"--workdir={tmp_path / 'run'}",
        f"--compilation_cache={cache}",
    )  # fmt: skip
    for line in program.stderr:  # notices, then rows
        if phase == "compile" and line.startswith("compiled programs are kept"):
            wait_for(tmp_path / "run" / "checkpoints" / "0", program)
            time.sleep(2)  # tracing has begun, and compiling comes next
            break
        if line.startswith("step 1/"):
            time.sleep(0.5)
            break
    program.send_signal(number)
    began = time.monotonic()
    output, errors = program.communicate(timeout=2 * GRACE)
    assert program.returncode == 128 + number, errors
    assert time.monotonic() - began < GRACE
    _, step = load_params(tmp_path / "run")
    if phase == "compile":
        assert step == 0 and "ended at once" in errors
    else:
        assert step >= 1 and f"stopped at step {step} and saved" in output


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_one_process_that_is_signalled_stops_all_at_one_step(process, tmp_path):
    """Two processes of one run; the signal comes to either alone."""
    program = start(
        "-m", "launch.local_processes", "--processes=2", "--", sys.executable,
        "-m", "launch.train", *[x for x in TRAIN if "mesh" not in x],
        f"--workdir={tmp_path / 'run'}",
        f"--compilation_cache={ROOT / '.pytest_cache' / 'signals'}",
    )  # fmt: skip
    for line in program.stdout:  # notices and rows of both
        if "step 1/" in line:
            break
    beat = tmp_path / "run" / "heartbeats" / f"{process}.json"
    wait_for(beat, program)
    os.kill(json.loads(beat.read_text())["pid"], signal.SIGUSR1)
    output, errors = program.communicate(timeout=2 * GRACE)
    _, step = load_params(tmp_path / "run")
    assert f"[{process}] stopped at step {step} and saved" in output, errors
    assert f"[{1 - process}] stopped with another process at step {step} and saved" in output
    assert program.returncode in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_leaves_the_one_before(tmp_path):
    """Exit code 128 + signal, and evaluation.json is what it was."""
    workdir = tmp_path / "run"
    one_step = ["--config.training.steps=1", "--config.training.warmup_steps=0"]
    trained = start("-m", "launch.train", *TRAIN, *one_step, f"--workdir={workdir}")
    trained.communicate()
    assert trained.returncode == 0 and load_config(workdir)
    write_atomic(workdir / "evaluation.json", "what was measured before")
    program = start("-m", "launch.evaluate", f"--workdir={workdir}", "--examples=1000000")
    assert "with N = " in program.stdout.readline()
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=GRACE)
    assert program.returncode == 128 + signal.SIGTERM
    assert (workdir / "evaluation.json").read_text() == "what was measured before"
    assert not list(workdir.glob(".evaluation*"))


def wait_for(path, program):
    while not path.exists():
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.05)
