"""Whoever looks at a run from outside learns where it stands, and that it stands still."""

import json
import threading

import pytest
import waiting
from hands import Hands

from sleepnet.training import watch
from sleepnet.training.throughput import Clock
from sleepnet.training.watch import HEARTBEATS, STALLS, Watch


@pytest.fixture
def hands(monkeypatch):
    """Time in the test's hands; threads do not look by themselves."""
    monkeypatch.setattr(watch, "INTERVAL", 3600.0)
    return Hands()


@pytest.fixture
def watched(tmp_path, hands):
    """A clock in phase "step" of step 7, what is told of it, and how to watch it."""
    clock = Clock(tmp_path, hands)
    clock.enter("step", 7)
    notices, stalls = [], []

    def start(stall_seconds):
        return Watch(
            tmp_path, clock, stall_seconds=stall_seconds,
            on_notice=notices.append, on_stall=stalls.append,
        )  # fmt: skip

    return clock, notices, stalls, start


def test_a_step_that_hangs_is_reported_with_the_stacks_of_all_threads(watched, hands, tmp_path):
    """Once per stall: with phase, step and seconds; and again if it stalls again, though nobody
    looked meanwhile."""
    clock, _, stalls, start = watched
    inside, gate = threading.Event(), threading.Event()

    def hang_here():
        inside.set()
        assert gate.wait(waiting.PATIENCE)

    hanging = threading.Thread(target=hang_here, daemon=True)
    hanging.start()
    assert inside.wait(waiting.PATIENCE)
    watching = start(stall_seconds=600)
    for hands.seconds in (599, 600, 601, 9999):
        watching.look()
        assert len(stalls) == (hands.seconds >= 600)
    assert "phase step, step 7: no sign of life for 600 s" in stalls[0]
    stacks = (tmp_path / STALLS / "process0-step7.txt").read_text()
    assert "hang_here" in stacks
    clock.enter("step", 8)
    hands.seconds += 600
    watching.look()
    assert len(stalls) == 2 and "step 8" in stalls[1]
    gate.set()
    waiting.join(hanging)
    watching.close()


def test_a_thread_looks_by_itself(watched, hands):
    """Four times in the seconds after which a loop has stalled."""
    _, _, stalls, start = watched
    watching = start(stall_seconds=0.1)
    hands.seconds = 1.0
    waiting.until(lambda: stalls, "a report of the stall")
    watching.close()


@pytest.mark.parametrize("phase", ["restore", "compile"])
def test_a_long_restore_or_compilation_is_told_but_is_no_stall(watched, hands, phase):
    """One call may take any time: the program is not ended for it, and the next step may stall."""
    clock, notices, stalls, start = watched
    clock.enter(phase, 0)
    watching = start(stall_seconds=600)
    hands.seconds = 700
    watching.look()
    assert f"phase {phase}, step 0: no sign of life for 700 s" in notices[0] and not stalls
    clock.enter("step", 1)
    hands.seconds = 1400
    watching.look()
    assert len(notices) == len(stalls) == 1
    watching.close()


def test_a_loop_that_lives_is_not_reported(watched, hands):
    clock, _, stalls, start = watched
    watching = start(stall_seconds=600)
    for step in range(20):
        clock.enter("step", step)
        hands.seconds += 599
        watching.look()
    watching.close()
    assert not stalls


def test_the_heartbeat_says_where_the_process_stands(watched, tmp_path):
    _, _, _, start = watched
    start(stall_seconds=0.0).close()
    beat = json.loads((tmp_path / HEARTBEATS / "0.json").read_text())
    assert (beat["process"], beat["phase"], beat["step"]) == (0, "step", 7)
    assert {"host", "pid", "time"} <= beat.keys()


def test_a_process_that_falls_silent_is_named(watched, hands, tmp_path, monkeypatch):
    """By the first one's own clock: the time that a heartbeat tells does not matter."""
    monkeypatch.setattr(watch.jax, "process_count", lambda: 3)
    _, notices, _, start = watched
    watching = start(stall_seconds=0.0)
    beats = tmp_path / HEARTBEATS
    for hands.seconds in (0, 20, 31, 50):
        watching.look()
        (beats / "1.json").write_text(f'{{"time": "1970", "count": {hands.seconds}}}')
    assert [notice.split(" has")[0] for notice in notices] == ["process 2"]
    (beats / "2.json").write_text("{}")
    watching.look()
    assert notices[1:] == ["process 2 is heard of again"]
    watching.close()


def test_a_full_disk_is_told_once(watched, monkeypatch):
    _, notices, _, start = watched

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch.storage, "write_json", full)
    watching = start(stall_seconds=0.0)
    watching.look()
    watching.look()
    watching.close()
    assert notices == ["no heartbeat: [Errno 28] No space left on device"]
