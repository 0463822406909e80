"""What is written to people obeys no model and stops no program."""

import os
import re

import pytest

from launch.common.live_line import notify, printable, tell


def test_a_terminal_gets_no_control_characters():
    """But newlines and tabs; what is shown instead names the character."""
    every = "".join(map(chr, range(0x250)))
    shown = printable(every)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    unescaped = re.sub(r"\\x(\w\w)", lambda found: chr(int(found[1], 16)), shown)
    assert unescaped == every
    assert (
        printable("\x1b]0;owned\x07 \x9b2J é\t夢\r\n") == r"\x1b]0;owned\x07 \x9b2J é" "\t夢\\x0d\n"
    )


def test_a_notice_that_nobody_reads_stops_nothing():
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open(reader) as other_end:
        notify(stream, "read")
        assert other_end.readline() == "read\n"
        other_end.close()
        for _ in range(3):
            notify(stream, "unread")
        assert tell(stream, "to nowhere")  # what is not read is not kept either
    notify(None, "closed when the program began")


def test_a_notice_on_a_full_disk_stops_nothing():
    with open("/dev/full", "w") as stream:
        notify(stream, "lost")
    with open("/dev/full", "w") as stream, pytest.raises(OSError, match="No space left"):
        tell(stream, "lost")
