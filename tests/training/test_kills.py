"""Killed at random moments and resumed each time, a run ends bit-equal; see kill_and_resume.py."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(processes):
    """Parameters, optimizer state and rows of metrics; one process, and two that train together."""
    done = subprocess.run(
        [sys.executable, TESTS / "kill_and_resume.py", "--kills=6", f"--processes={processes}"],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bit-equal" in done.stdout
