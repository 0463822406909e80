"""A prompt is the text that was meant, and nobody waits for one without a word."""

import os
import threading

import pytest
import waiting

from launch.common import prompts
from sleepnet.config import ConfigError


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a mind", "a mind"),
        (b"\xef\xbb\xbfa mind\n", "a mind"),
        ("naïve 夢\r\n".encode(), "naïve 夢"),
        (b"a mind\n\n", "a mind\n"),
        (b"\n", ""),
        (b"\xef\xbb\xbf", ""),
        (b"a\r", "a\r"),
        (b"a\n\xef\xbb\xbfb ", "a\n\ufeffb "),
        (b"", ""),
    ],
)
def test_a_file_is_read_without_what_editors_add(content, text):
    """A byte-order mark, and one newline at the end; all else is the prompt's."""
    assert prompts.decode_file("--prompt_file=x", content) == text


def test_a_prompt_in_another_encoding_is_named():
    for decode in (prompts.decode, prompts.decode_file):
        with pytest.raises(ConfigError, match=r"^--prompt_file=x is no text in UTF-8: .* at 5$"):
            decode("--prompt_file=x", b"a caf\xe9")


def test_waiting_for_a_prompt_is_told_once(monkeypatch):
    """While nothing comes, and while there is no end; all that came is then read."""
    monkeypatch.setattr(prompts, "_PATIENCE", 0.01)
    reader, writer = os.pipe()
    told, found = threading.Semaphore(0), []
    with open(reader, "rb") as stream:
        read = threading.Thread(
            target=lambda: found.append(prompts.read_to_end(stream, on_waiting=told.release))
        )
        read.start()
        assert told.acquire(timeout=waiting.PATIENCE)
        os.write(writer, b"a mi")
        os.write(writer, b"nd")
        os.close(writer)
        waiting.join(read)
    assert found == [b"a mind"] and not told.acquire(blocking=False)


def test_a_prompt_that_is_there_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "_PATIENCE", 3600)
    (tmp_path / "prompt").write_bytes(b"a mind")
    before = threading.active_count()
    with open(tmp_path / "prompt", "rb") as stream:
        assert prompts.read_to_end(stream, on_waiting=pytest.fail) == b"a mind"
    waiting.join(*(one for one in threading.enumerate() if isinstance(one, threading.Timer)))
    assert threading.active_count() <= before
