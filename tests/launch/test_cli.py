"""What all programs share at the command line: help that can be pasted, and flags that are missing
named in one line."""

import ast
import os
import pathlib
import re
import signal
import subprocess
import sys
import warnings
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import depo_small
from launch import cli
from sleepnet.config import FOLLOWS, ConfigError, DepoConfig, field_paths, fields_at

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAMS = [path for path in sorted((ROOT / "launch").glob("*.py"))
            if "cli.run(main" in path.read_text()]  # fmt: skip


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{program}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


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


def test_parameters_too_coarse_to_train_are_refused_with_what_to_set():
    """Wherever an experiment is read: to train, to sweep, to be looked at by the doctor."""
    values = depo_small.get_config()
    values.model.compute_dtype = "bfloat16"
    assert cli.experiment_config(values).model.param_dtype == "float32"
    values.model.param_dtype = "bfloat16"
    with pytest.raises(ConfigError, match="must be float32 in training"):
        cli.experiment_config(values)


def test_help_is_no_failure():
    done = run("train", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "--workdir=runs/depo \\\n        [--config.model.passes=4]" in done.stdout
    assert "--workdir: Folder of the run" in done.stdout


MANY_LINES = """
from launch import cli
def main(_):
    for _ in range(100_000):
        print("4 × 4 → ±é–", flush=True)
cli.run(main)
"""


def test_no_character_and_no_reader_that_leaves_ends_a_program_in_a_traceback():
    """What the encoding lacks is escaped; and `| head -1` ends it without a word."""
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, MANY_LINES],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "4 \\xd7 4 \\u2192 \\xb1\\xe9\\u2013\n" and not done.stderr
    assert done.returncode == 128 + signal.SIGPIPE


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


def parsed(monkeypatch, *arguments) -> Any:
    """The values of --config, as a program reads them from its arguments."""
    argv, own = ["program", *arguments], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=own, sys_argv=argv)
    monkeypatch.setattr(flags, "FLAGS", own)
    with warnings.catch_warnings():  # of how ml_collections loads a file
        warnings.simplefilter("ignore", DeprecationWarning)
        cli._parse(argv, takes_words=False)
    return own["config"].value


EXPERIMENTS = ("depo_small", "rule110_small", "long_horizon", "text_small")
SOME = {int: "3", float: "0.5", tuple[int, ...]: "(1,)", tuple[str, ...]: "('a',)"}


def follows(path: str) -> bool:
    """Whether the field is None by default: it then follows others."""
    of_task = path in ("model.window", "model.vocab_size")
    return of_task or any(field.default is FOLLOWS for field in fields_at(path))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_that_follows_others_takes_none(name, monkeypatch):
    """As the last of its overrides, in both forms of a flag; another after it replaces it."""
    file = f"--config={ROOT / 'experiments' / name}.py"
    fields = {field for section in parsed(monkeypatch, file).values() for field in section}
    paths = [path for path in field_paths() if follows(path) and path.split(".")[1] in fields]
    assert len(paths) >= 11
    some = [f"--config.{path}={SOME[fields_at(path)[0].type]}" for path in paths]
    for none in (
        [f"--config.{path}=None" for path in paths],
        [word for path in paths for word in (f"--config.{path}", "None")],
    ):
        values = parsed(monkeypatch, file, *some, *none)
        assert not [path for path in paths if values[path] is not None]
        values = parsed(monkeypatch, file, *none, *some)
        assert not [path for path in paths if values[path] is None]


def test_none_is_checked_like_any_value(monkeypatch):
    file = f"--config={ROOT / 'experiments' / 'depo_small.py'}"
    plain = cli.experiment_config(parsed(monkeypatch, file))
    none = ("--config.model.head_dim=None", "--config.task.min_nodes=None")
    assert cli.experiment_config(parsed(monkeypatch, file, *none)) == plain
    for path, kind in (
        ("model.passes", "int"), ("model.unroll", "bool"), ("task.nodes", "int"),
        ("task.window", "int"), ("training.clip_norm", "float"), ("evaluation.passes", "tuple"),
    ):  # fmt: skip
        values = parsed(monkeypatch, file, f"--config.{path}=None")
        with pytest.raises(ConfigError, match=f"{path} must be of type {kind}; got None"):
            cli.experiment_config(values)
    values = parsed(monkeypatch, file, "--config.model.rule=None")  # of text it is a word
    with pytest.raises(ConfigError, match="rule: got 'None'; allowed: gated_delta"):
        cli.experiment_config(values)
    with pytest.raises(ConfigError, match=r"no such field; .* --config\.model\.head_dim$"):
        parsed(monkeypatch, file, "--config.model.hed_dim=None")


def test_none_may_stand_in_a_file(monkeypatch, tmp_path):
    """Also for a field that had a value; and it can be overridden by one of its type."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from experiments import depo_small\n"
        "from experiments.defaults import experiment\n"
        "def get_config():\n"
        "    task = dict(name='depo', min_nodes=None, test_hops=(1,))\n"
        "    config = experiment(task=task, model=dict(d_model=32, head_dim=4), training={})\n"
        "    config.model.head_dim = None\n"
        "    config.task.test_hops = None\n"
        "    return config\n"
    )
    config = cli.experiment_config(parsed(monkeypatch, f"--config={path}"))
    assert isinstance(config.task, DepoConfig)
    assert (config.model.head_dim, config.task.test_hops) == (8, (1, 2, 3, 4))
    overrides = ("--config.model.head_dim=4", "--config.task.test_hops=(2,)")
    config = cli.experiment_config(parsed(monkeypatch, f"--config={path}", *overrides))
    assert isinstance(config.task, DepoConfig)
    assert (config.model.head_dim, config.task.test_hops) == (4, (2,))
    with pytest.raises(ConfigError, match="head_dim"):
        parsed(monkeypatch, f"--config={path}", "--config.model.head_dim=four")
