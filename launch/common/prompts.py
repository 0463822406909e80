"""What a model goes on from: text that was given in a flag, a file or on standard input."""

import threading
from collections.abc import Callable
from typing import BinaryIO

from sleepnet.config import ConfigError

_PATIENCE = 1.0  # seconds


def decode(source: str, content: bytes) -> str:
    """Decode UTF-8.

    Raises:
      ConfigError: names the source and the place of what is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is no text in UTF-8: {error.reason} at {error.start}"
        ) from None


def decode_file(source: str, content: bytes) -> str:
    """Decode the UTF-8 of a file, without what editors and shells add to a text.

    These are a byte-order mark and one newline at the end.

    Raises:
      ConfigError: as `decode`.
    """
    text = decode(source, content).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def read_to_end(stream: BinaryIO, *, on_waiting: Callable[[], object]) -> bytes:
    """Read all of a stream; `on_waiting` is called once if its end is long in coming.

    Raises:
      OSError: it cannot be read; EBADF if it was opened for writing alone.
    """
    timer = threading.Timer(_PATIENCE, on_waiting)
    timer.daemon = True
    timer.start()
    try:
        return stream.read()
    finally:
        timer.cancel()
