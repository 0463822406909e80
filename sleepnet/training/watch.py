"""A thread that watches over a run: heartbeats, a loop that stands still, processes unheard of."""

import dataclasses
import faulthandler
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable

import jax

from sleepnet import storage
from sleepnet.training.throughput import LONG, Clock

HEARTBEATS, STALLS = "heartbeats", "stalls"
INTERVAL = 5.0  # seconds between heartbeats
UNHEARD = 30.0  # seconds without a new heartbeat of another process, until it is named


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """`heartbeats/PROCESS.json`: where a process stands. time: UTC, by its own clock."""

    process: int
    host: str
    pid: int
    phase: str
    step: int
    time: str


class Watch:
    """Writes the heartbeat of this process, and reports what stands still: a thread calls `look`.

    A loop that gives no sign of life for `stall_seconds` (0: however long) is reported once, with
    the stacks of all threads in `stalls/`: a stall, but in phases of one long call, whose silence
    says nothing, a notice. The first process also names others whose heartbeat
    does not change, by its own clock, so that theirs may be off.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        clock: Clock,
        *,
        stall_seconds: float,
        on_notice: Callable[[str], None],
        on_stall: Callable[[str], None],
    ):
        self._folder = pathlib.Path(workdir)
        self._clock = clock
        self._stall_seconds = stall_seconds
        self._on_notice, self._on_stall = on_notice, on_stall
        self._process, self._first = jax.process_index(), jax.process_index() == 0
        self._others = _Others(self._folder / HEARTBEATS, clock.now) if self._first else None
        self._stalled_since: float | None = None  # the last sign of life before a stall
        self._refused = ""  # why the last heartbeat could not be written
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self):
        """The last heartbeat is written."""
        self._ended.set()
        self._thread.join()
        self._beat()

    def _run(self):
        interval = min(INTERVAL, self._stall_seconds / 4) if self._stall_seconds else INTERVAL
        while not self._ended.wait(interval):
            self.look()

    def look(self):
        """Write a heartbeat, and report what has stood still since the last look."""
        self._beat()
        self._look_for_stall()
        for notice in self._others.unheard() if self._others else ():
            self._on_notice(notice)

    def _beat(self):
        beat = Heartbeat(
            self._process, socket.gethostname(), os.getpid(), self._clock.phase, self._clock.step,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )  # fmt: skip
        path = self._folder / HEARTBEATS / f"{self._process}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            storage.write_json(path, dataclasses.asdict(beat))
            if self._first:
                self._clock.save()
        except (OSError, storage.StorageError) as error:
            if self._refused != str(error):
                self._refused = str(error)
                self._on_notice(f"no heartbeat: {error}")
        else:
            self._refused = ""

    def _look_for_stall(self):
        since, silent = self._clock.last_sign, self._clock.silent_for()
        stalls = 0 < self._stall_seconds <= silent
        if stalls and since != self._stalled_since:
            self._stalled_since = since
            tell = self._on_notice if self._clock.phase in LONG else self._on_stall
            tell(self._report(silent))

    def _report(self, silent):
        where = f"process {self._process}, phase {self._clock.phase}, step {self._clock.step}"
        path = self._folder / STALLS / f"process{self._process}-step{self._clock.step}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(f"{where}: no sign of life for {silent:.0f} s\n")
                file.flush()  # the stacks go past its buffer
                faulthandler.dump_traceback(file, all_threads=True)
            stacks = f"what each thread does stands in {path}"
        except OSError as error:
            stacks = f"what each thread does cannot be written to {path}: {error.strerror}"
        return f"{where}: no sign of life for {silent:.0f} s; {stacks}"


class _Others:
    """The heartbeats of the other processes, as this one sees them change."""

    def __init__(self, folder, now):
        self._folder, self._now = folder, now
        self._seen = {
            i: ("", now()) for i in range(jax.process_count()) if i != jax.process_index()
        }
        self._named = set()

    def unheard(self):
        """A notice for each process that has fallen silent since the last call, or is back."""
        for process, (content, since) in self._seen.items():
            found = self._read(process)
            silent = self._now() - since
            if found != content:
                self._seen[process] = found, self._now()
                if process in self._named:
                    self._named.remove(process)
                    yield f"process {process} is heard of again"
            elif silent > UNHEARD and process not in self._named:
                self._named.add(process)
                last = content.replace("\n", " ") if content else "it never was"
                yield f"process {process} has not been heard of for {silent:.0f} s; last: {last}"

    def _read(self, process):
        try:
            return (self._folder / f"{process}.json").read_text()
        except OSError:
            return ""
