"""TensorBoard's records, for whoever appends them to a file.

tensorboardX makes their contents; its own writer does not do: its thread dies of a full disk, and
the queue in front of that thread then keeps the program from ending.
"""

import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import (  # made at import time, unseen by type checkers
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c


def file_name() -> str:
    """Of a start that begins now: TensorBoard reads files in the order of their names."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"


def begin(first_step: int) -> bytes:
    """What comes first: steps from this one on, of earlier files, do not count."""
    start = SessionLog(status=SessionLog.START)
    return _record(file_version="brain.Event:2") + _record(step=first_step, session_log=start)


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """A record for each value."""
    return b"".join(
        _record(step=step, summary=summary.scalar(name, value)) for name, value in values.items()
    )


def _record(**event) -> bytes:
    """In TFRecord's frame: length, its checksum, data, their checksum."""
    data = Event(wall_time=time.time(), **event).SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
