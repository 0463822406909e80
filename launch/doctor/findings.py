"""What `launch.doctor` looks at, one kind of thing a module; each check returns findings."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable

OK, WRONG, SKIPPED = "ok", "wrong", "skipped"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what was seen, and what to do about it."""

    check: str
    status: str
    seen: str
    advice: str = ""


def ok(check: str, seen: str) -> Finding:
    return Finding(check, OK, seen)


def wrong(check: str, seen: str, advice: str) -> Finding:
    return Finding(check, WRONG, seen, advice)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, SKIPPED, why)


class Deadline:
    """A moment that several checks share, by the clock `now`."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._now())


def within(
    seconds: float, check: str, look: Callable[[], Iterable[Finding]], advice: str
) -> list[Finding]:
    """The findings of `look`, or one that says that it hangs; it is then left behind.

    Args:
      advice: what to do if it hangs.
    """
    done = queue.SimpleQueue()

    def run():
        try:
            done.put(list(look()))
        except Exception as error:
            done.put([wrong(check, f"the check failed: {error!r}", "tell us: this is a bug")])

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.get(timeout=seconds)
    except queue.Empty:
        return [wrong(check, f"hangs: no answer within {seconds:.0f} s", advice)]
