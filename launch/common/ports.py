"""Ports of this machine, for processes that are about to listen on them."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Hold a port, so that no other program is given it while the block runs.

    A program that knows its number can listen on it: the address may be reused, and nobody listens
    here.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
