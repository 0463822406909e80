"""Rows of metrics reach TensorBoard, too, and a disk that is full keeps no program from ending."""

import struct
import sys

import numpy as np
import pytest
import waiting
from tensorboardX.proto import event_pb2

from sleepnet.training.metrics import BOARD, METRICS, TIMING, MetricsWriter, read_rows

FULL = """
import pathlib, resource, signal, sys
from sleepnet.storage import StorageError
from sleepnet.training.metrics import MetricsWriter
writer = MetricsWriter(pathlib.Path(sys.argv[1]), 0)
writer.write(1, {"loss": 1.0}, {"seconds": 1.0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit))
for step in range(2, 2000):
    try:
        writer.write(step, {"loss": 1.0}, {"seconds": 1.0})
    except StorageError as error:
        print(error)
if sys.argv[2] == "room again":
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
writer.close()
"""


def crc32c(data):
    """Bit by bit, as its definition has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def events(folder):
    """All that TensorBoard would read, in its order."""
    for path in sorted(folder.iterdir()):
        assert "tfevents" in path.name
        data = path.read_bytes()
        while data:
            length, of_length = struct.unpack("<QI", data[:12])
            assert of_length == masked(data[:8])
            record = data[12 : 12 + length]
            (of_record,) = struct.unpack_from("<I", data, 12 + length)
            assert of_record == masked(record)
            yield event_pb2.Event.FromString(record)
            data = data[16 + length :]


def shown(folder):
    """Step -> values: of each start, what the next one does not take back."""
    seen = {}
    for event in events(folder):
        if event.HasField("session_log"):
            seen = {step: values for step, values in seen.items() if step < event.step}
        for value in event.summary.value:
            seen.setdefault(event.step, {})[value.tag] = value.simple_value
    return seen


def test_tensorboard_shows_the_rows_and_what_a_crash_took_back_is_gone(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step}, {"seconds": step})
    writer.close()
    resumed = MetricsWriter(tmp_path, 2)
    resumed.write(3, {"loss": 0.25}, {})
    resumed.close()
    assert next(events(tmp_path / BOARD)).file_version == "brain.Event:2"
    assert shown(tmp_path / BOARD) == {
        1: {"loss": 1.0, "seconds": 1.0},
        2: {"loss": 0.5, "seconds": 2.0},
        3: {"loss": 0.25},
    }
    assert [row["loss"] for row in read_rows(tmp_path / METRICS)] == [1, 0.5, 0.25]


def test_values_are_those_of_float32(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(7, {"nan": float("nan"), "third": 1 / 3}, {})
    writer.close()
    values = shown(tmp_path / BOARD)[7]
    assert np.isnan(values["nan"]) and values["third"] == np.float32(1 / 3)


@pytest.mark.parametrize("then", ["still full", "room again"])
def test_a_program_whose_disk_is_full_ends(tmp_path, then):
    """At once, however many rows wait; and if there is room in the end, none is lost."""
    done = waiting.run(sys.executable, "-c", FULL, tmp_path, then)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {tmp_path / METRICS}: File too large" in done.stdout
    steps = list(range(1, 2000 if then == "room again" else 2))
    for name in (METRICS, TIMING):
        assert [row["step"] for row in read_rows(tmp_path / name)] == steps
    assert list(shown(tmp_path / BOARD)) == steps
