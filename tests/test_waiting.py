"""What tests wait with: however late a thing comes, it is seen; what never comes is told."""

import os
import sys
import threading

import pytest
import waiting


@pytest.fixture
def pipe():
    """What has come out of it, and the end to write to."""
    ours, theirs = os.pipe()
    return waiting.Reader(ours), theirs


def test_what_comes_in_pieces_is_seen_whole(pipe):
    """However little there is when somebody looks first."""
    reader, theirs = pipe
    os.write(theirs, "a café".encode()[:-1])
    assert reader.until("caf").startswith("a caf")
    os.write(theirs, "a café".encode()[-1:])
    assert reader.until("é$") == "a café"
    os.close(theirs)
    assert reader.to_the_end() == "a café"


def test_what_does_not_come_is_told_with_what_came(pipe, monkeypatch):
    """At the end at once; before it when patience ends."""
    reader, theirs = pipe
    os.write(theirs, b"one")
    reader.until("one")
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    with pytest.raises(AssertionError, match=r"'two' did not come, but 'one', in 0 s"):
        reader.until("two")
    with pytest.raises(AssertionError, match="still open after 0 s; 'one' came"):
        reader.to_the_end()
    monkeypatch.undo()
    os.close(theirs)
    with pytest.raises(AssertionError, match=r"'two' did not come, but 'one', and no more will"):
        reader.until("two")


def test_a_program_that_ends_too_soon_is_told_with_its_words():
    program = waiting.Program(sys.executable, "-c", "print('a word'); raise SystemExit(3)")
    with pytest.raises(AssertionError, match="ended before: a sign; output: a word"):
        program.end()
        waiting.until(lambda: None, "a sign", program)


def test_a_thread_that_does_not_end_is_told_with_where_it_stands(monkeypatch):
    inside, gate = threading.Event(), threading.Event()

    def stand_here():
        inside.set()
        gate.wait(waiting.TOO_LONG)

    thread = threading.Thread(target=stand_here, daemon=True)
    thread.start()
    assert inside.wait(waiting.PATIENCE)
    with monkeypatch.context() as during, pytest.raises(AssertionError, match="stand_here"):
        during.setattr(waiting, "PATIENCE", 0.0)
        waiting.join(thread)
    gate.set()
    waiting.join(thread)


def test_what_a_failed_test_has_started_does_not_live_on():
    program = waiting.Program(sys.executable, "-c", f"import time; time.sleep({waiting.TOO_LONG})")
    waiting.end_programs()
    assert program.process.returncode < 0
