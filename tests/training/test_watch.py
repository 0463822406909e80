"""Whoever looks at a run from outside learns where it stands, and that it stands still."""

import json
import threading
import time

import pytest

from sleepnet.training import watch
from sleepnet.training.clock import Clock
from sleepnet.training.watch import HEARTBEATS, STALLS, Watch


@pytest.fixture
def watched(tmp_path):
    """A clock in phase "step" of step 7, what is told of it, and how to watch it."""
    clock = Clock(tmp_path)
    clock.enter("step", 7)
    notices, stalls = [], []

    def start(stall_seconds):
        return Watch(
            tmp_path, clock, stall_seconds=stall_seconds,
            on_notice=notices.append, on_stall=stalls.append,
        )  # fmt: skip

    return clock, notices, stalls, start


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("not within ten seconds")


def test_a_step_that_hangs_is_reported_with_the_stacks_of_all_threads(watched, tmp_path):
    """Once per stall: with phase, step and seconds; and again if it stalls again."""
    clock, _, stalls, start = watched
    gate = threading.Event()

    def hang_here():
        gate.wait()

    hanging = threading.Thread(target=hang_here)
    hanging.start()
    watching = start(stall_seconds=0.2)
    wait_for(lambda: stalls)
    time.sleep(0.3)
    assert len(stalls) == 1
    assert "phase step, step 7: no sign of life for 0 s" in stalls[0]
    stacks = (tmp_path / STALLS / "process0-step7.txt").read_text()
    assert "hang_here" in stacks and "MainThread" not in stacks.splitlines()[0]
    clock.enter("step", 8)
    time.sleep(0.1)
    wait_for(lambda: len(stalls) == 2)
    assert "step 8" in stalls[1]
    gate.set()
    hanging.join()
    watching.close()


@pytest.mark.parametrize("phase", ["restore", "compile"])
def test_a_long_restore_or_compilation_is_told_but_is_no_stall(watched, phase):
    """One call may take any time: the program is not ended for it, and the next step may stall."""
    clock, notices, stalls, start = watched
    clock.enter(phase, 0)
    watching = start(stall_seconds=0.1)
    wait_for(lambda: notices)
    assert f"phase {phase}, step 0: no sign of life for 0 s" in notices[0] and not stalls
    clock.enter("step", 1)
    wait_for(lambda: stalls)
    assert len(notices) == len(stalls) == 1
    watching.close()


def test_a_loop_that_lives_is_not_reported(watched):
    clock, _, stalls, start = watched
    watching = start(stall_seconds=0.4)
    for step in range(20):
        clock.enter("step", step)
        time.sleep(0.05)
    watching.close()
    assert not stalls


def test_the_heartbeat_says_where_the_process_stands(watched, tmp_path):
    _, _, _, start = watched
    start(stall_seconds=0.0).close()
    beat = json.loads((tmp_path / HEARTBEATS / "0.json").read_text())
    assert (beat["process"], beat["phase"], beat["step"]) == (0, "step", 7)
    assert {"host", "pid", "time"} <= beat.keys()


def test_a_process_that_falls_silent_is_named(tmp_path, monkeypatch):
    """By the first one's own clock: the time that a heartbeat tells does not matter."""
    monkeypatch.setattr(watch.jax, "process_count", lambda: 3)
    monkeypatch.setattr(watch, "UNHEARD", 0.2)
    beats = {process: tmp_path / f"{process}.json" for process in (1, 2)}
    others = watch._Others(tmp_path)
    began = time.monotonic()
    told = []
    while time.monotonic() < began + 0.4:
        beats[1].write_text(f'{{"time": "1970", "count": {time.monotonic()}}}')
        told += others.unheard()
        time.sleep(0.02)
    assert [notice.split(" has")[0] for notice in told] == ["process 2"]
    beats[2].write_text("{}")
    assert list(others.unheard()) == ["process 2 is heard of again"]


def test_a_full_disk_is_told_once(watched, tmp_path, monkeypatch):
    _, notices, _, start = watched

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch.storage, "write_json", full)
    watching = start(stall_seconds=0.2)
    time.sleep(0.3)
    watching.close()
    assert notices == ["no heartbeat: [Errno 28] No space left on device"]
