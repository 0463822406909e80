"""What all programs share at the command line: help that can be pasted, and flags that are missing
named in one line."""

import ast
import pathlib
import re
import sys

import pytest
import waiting

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAMS = [path for path in sorted((ROOT / "launch").glob("*.py"))
            if "cli.run(main" in path.read_text()]  # fmt: skip


def run(program, *arguments):
    return waiting.run(sys.executable, "-m", f"launch.{program}", *arguments)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help_shows_each_line_as_it_is_written(path):
    """A backslash at the end of a line of a shell is kept: Python would join it with the next."""
    [about, *_] = ast.parse(path.read_text()).body
    assert about.value.value.count("\n") == about.end_lineno - about.lineno


def test_words_that_no_flag_takes_are_refused():
    """Such as the rest of a prompt without quotes."""
    done = run("evaluate", "--workdir=x", "two", "words")
    assert done.returncode == 2 and done.stderr.startswith("error: 'two' is no flag")


def test_every_program_that_is_told_of_can_be_started():
    """No package hides it."""
    code = (path for room in ("launch", "experiments") for path in (ROOT / room).rglob("*.py"))
    told = set()
    for path in (*ROOT.glob("*.md"), ROOT / "Makefile", *code):
        told.update(re.findall(r"python -m ((?:launch|experiments)\.\w+)", path.read_text()))
    assert len(told) > 12
    for module in told:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() and not path.exists(), module


def test_help_is_no_failure():
    done = run("train", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "--workdir=runs/depo \\\n        [--config.model.passes=4]" in done.stdout
    assert "--workdir: Folder of the run" in done.stdout


CONFIG = "--config=... (Experiment file, such as experiments/depo_small.py)"
WORKDIR = "--workdir=... (Folder of the run: made new, or resumed)"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ((), f"{WORKDIR} and {CONFIG}"),
        pytest.param(("--workdir=x", "--config.model.passes=4"), CONFIG, marks=pytest.mark.slow),
    ],
    ids=["none", "an override of no config"],
)
def test_flags_that_are_missing_are_asked_for(given, asked):
    """All at once, in one line, each with what it is for; exit code 2."""
    done = run("train", *given)
    assert done.returncode == 2
    assert done.stderr == f"error: give {asked}\n"
