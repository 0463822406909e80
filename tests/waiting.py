"""Wait for what other threads and programs do: for the event, never for a time.

Every wait gives up after `PATIENCE` and fails with what it has seen until then. That is longer than
any machine is busy; a test that passes waits no longer than for its event.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 600.0  # seconds
TOO_LONG = 2 * PATIENCE  # seconds, of what no test may wait for
_started: list["Program"] = []


def until(condition: Callable[[], Any], what: str, program: "Program | None" = None):
    """Return the first true value of `condition()`; fail if `program` ends without one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = program is not None and program.process.poll() is not None
        if found := condition():
            return found
        told = f"; {program.told}" if program is not None else ""
        assert not ended, f"the program ended before: {what}{told}"
        assert time.monotonic() < deadline, f"not in {PATIENCE:g} s: {what}; got {found!r}{told}"
        time.sleep(0.02)


def join(*threads: threading.Thread):
    """Wait until all threads have ended."""
    for thread in threads:
        thread.join(PATIENCE)
        if thread.is_alive():
            frame = sys._current_frames().get(thread.ident or 0)
            stack = "".join(traceback.format_stack(frame))
            raise AssertionError(f"{thread.name} does not end in {PATIENCE:g} s:\n{stack}")


class Reader:
    """Collect all that comes from a pipe or a terminal, in a thread, so that it never fills up."""

    def __init__(self, descriptor: int, encoding: str = "utf-8"):
        self._descriptor, self._read, self._ended = descriptor, bytearray(), False
        self._encoding = encoding
        self._news = threading.Condition()
        threading.Thread(target=self._collect, daemon=True).start()

    @property
    def text(self) -> str:
        """Return what has come so far."""
        with self._news:
            return self._read.decode(self._encoding, errors="replace")

    def until(self, pattern: str) -> str:
        """Wait until a regular expression is found in what has come; return all of that."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._find(pattern), PATIENCE)
            end = "and no more will" if self._ended else f"in {PATIENCE:g} s"
            assert self._find(pattern), f"{pattern!r} did not come, but {self.text!r}, {end}"
            return self.text

    def to_the_end(self) -> str:
        """Wait until everyone who can write has closed the other end; return all that came."""
        with self._news:
            self._news.wait_for(lambda: self._ended, PATIENCE)
            assert self._ended, f"still open after {PATIENCE:g} s; {self.text!r} came"
            return self.text

    def _find(self, pattern):
        return re.search(pattern, self.text, re.DOTALL)

    def _collect(self):
        with contextlib.suppress(OSError):  # as a terminal ends
            while piece := os.read(self._descriptor, 1 << 16):
                with self._news:
                    self._read += piece
                    self._news.notify_all()
        os.close(self._descriptor)
        with self._news:
            self._ended = True
            self._news.notify_all()


class Program:
    """Start a program in the repository, and collect what it writes.

    Args:
      command: the program and its arguments.
      input: all of its standard input, in UTF-8.
      encoding: that of what it writes.
      options: those of `subprocess.Popen`; a stream that they redirect is not collected.
    """

    def __init__(self, *command, input: str = "", encoding: str = "utf-8", **options):
        streams = {name: os.pipe() for name in ("stdout", "stderr") if name not in options}
        self.output, self.errors = (
            Reader(streams[name][0], encoding) if name in streams else None
            for name in ("stdout", "stderr")
        )
        with tempfile.TemporaryFile() as file:
            file.write(input.encode())
            file.seek(0)
            options = {"cwd": ROOT, "stdin": file} | options
            options |= {name: theirs for name, (_, theirs) in streams.items()}
            self.process = subprocess.Popen([*map(str, command)], start_new_session=True, **options)
        for _, theirs in streams.values():
            os.close(theirs)
        _started.append(self)

    @property
    def told(self) -> str:
        """Return what it has written so far, for a message."""
        streams = {"output": self.output, "errors": self.errors}
        return "; ".join(f"{name}: {one.text}" for name, one in streams.items() if one is not None)

    def send(self, number: int):
        """Send a signal to this process alone."""
        self.process.send_signal(number)

    def end(self, patience: float = PATIENCE) -> subprocess.CompletedProcess:
        """Wait until it has ended; return its exit code and all that it has written."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end in {patience:g} s; {self.told}") from None
        output, errors = (one and one.to_the_end() for one in (self.output, self.errors))
        return subprocess.CompletedProcess(self.process.args, code, output, errors)


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a program to its end, as `Program` does."""
    return Program(*command, **options).end()


def end_programs():
    """Kill what a test that failed has left running."""
    while _started:
        process = _started.pop().process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
