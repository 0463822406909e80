"""Killed at random moments and resumed each time, a run ends bit-equal; see kill_and_resume.py."""

import os
import pathlib
import sys

import pytest
import waiting

TESTS = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(processes):
    """Parameters, optimizer state and rows of metrics; one process, and two that train together."""
    kills = 6
    program = waiting.Program(
        sys.executable, TESTS / "kill_and_resume.py", f"--kills={kills}",
        f"--processes={processes}",
        env=os.environ | {"PYTHONPATH": str(waiting.ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    done = program.end(kills * waiting.PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bit-equal" in done.stdout
