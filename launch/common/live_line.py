"""What a program writes to people: streams that may end, and a line at the terminal's foot."""

import contextlib
import os
import re
import select
from typing import TextIO

# But for tabs and newlines; those from 0x80 on may begin a command of a terminal, too.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SAVE, _RESTORE, _CLEAR = "\x1b7", "\x1b8", "\x1b[K"


def tell(stream: TextIO | None, text: str) -> bool:
    """Writes at once; whether someone reads it. Where no one does any more, as behind `| head`, the
    stream takes this and all that follows for nothing.

    Raises:
      OSError: it cannot be written for another reason; what follows is taken for nothing, too.
    """
    if stream is None:  # closed when the program began
        return False
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            return False
        raise
    return True


def is_read(stream: TextIO | None) -> bool:
    """Whether the other end of a pipe is open still; a file or a terminal has no other."""
    if stream is None:
        return False
    other_end = select.poll()
    other_end.register(stream.fileno(), 0)
    return not other_end.poll(0)


def notify(stream: TextIO | None, text: str, end: str = "\n"):
    """Write a line at once; that it cannot be written stops nothing."""
    with contextlib.suppress(OSError):
        tell(stream, text + end)


def printable(text: str) -> str:
    """Escape characters that a terminal would obey, such as ESC; newlines and tabs stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class LiveLine:
    """Keeps the last row of a terminal for one line; without a terminal only `close` writes.

    Args:
      stream: where the terminal is, such as `sys.stderr`.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self._columns, self._rows = 0, 0
        if stream is not None and stream.isatty():
            self._columns, self._rows = os.get_terminal_size(stream.fileno())
        self._live = self._rows > 2
        if self._live:  # the rows above scroll on their own
            self._write(f"\n\x1b[A{_SAVE}\x1b[1;{self._rows - 1}r{_RESTORE}")

    def show(self, line: str):
        """In place of the line before."""
        if self._live:
            self._write(f"{_SAVE}\x1b[{self._rows};1H{line[: self._columns]}{_CLEAR}{_RESTORE}")

    def close(self, line: str):
        """Gives the row back and leaves the line behind what was written."""
        if self._live:
            self._write(f"{_SAVE}\x1b[{self._rows};1H{_CLEAR}\x1b[r{_RESTORE}")
        self._write(line + os.linesep)

    def _write(self, text: str):
        notify(self._stream, text, end="")
