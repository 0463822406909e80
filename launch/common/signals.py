"""SIGTERM, Ctrl-C and SIGUSR1, heard in every phase of a program.

A Python handler waits until the main thread is back in Python, which may be minutes while XLA
compiles. So a thread of its own reads the signals' numbers from a pipe, into which they are
written as they come.
"""

import os
import signal
import sys
import threading

from launch.common.live_line import notify

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """The first signal asks the program to stop; the second ends it at once.

    While there is nothing to save, the first one ends it at once, too. Exit code 128 + signal.
    """

    def __init__(self, nothing_to_save: bool = True):
        self.received: int | None = None
        self._nothing_to_save = nothing_to_save
        self._lock = threading.Lock()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.install()
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def install(self):
        """Again after `jax.distributed.initialize`, which takes SIGTERM for itself."""
        for number in SIGNALS:
            signal.signal(number, _nothing)

    def asked(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    def has_nothing_to_save(self, nothing: bool):
        """From now on. Ends the program if a signal came before, and now there is nothing."""
        with self._lock:
            self._nothing_to_save = nothing
            if nothing and self.received is not None:
                _end(self.received)

    def _listen(self, reader: int):
        while True:
            for number in os.read(reader, 16):
                if number in SIGNALS:
                    self._receive(number)

    def _receive(self, number: int):
        with self._lock:
            if self._nothing_to_save or self.received is not None:
                _end(number)
            self.received = number
        name = signal.Signals(number).name
        notify(sys.stderr, f"\n{name}: stopping after this step; saving a checkpoint")


def _nothing(*_):
    """A handler must be there for the number to be written into the pipe."""


def _end(number: int):
    notify(sys.stderr, f"\n{signal.Signals(number).name}: ended at once")
    notify(sys.stdout, "", end="")
    os._exit(128 + number)
