"""What all programs share at the command line: help that can be pasted, and flags that are missing
named in one line."""

import ast
import dataclasses
import errno
import os
import pathlib
import pwd
import re
import signal
import sys
import warnings
from typing import Any

import pytest
import waiting
from absl import flags
from ml_collections import config_flags

from experiments import depo_small
from launch.common import cli
from sleepnet.config import ConfigError, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.config.checks import FOLLOWS, local_path
from sleepnet.experiment import field_paths, fields_at
from sleepnet.tasks import TASKS, DepoConfig

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAMS = [
    path
    for room in ("experiments", "launch")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "cli.run(main" in path.read_text()
]


def module_of(path):
    """Return what `python -m` takes: a package stands for its `__main__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__main__")


def run(program, *arguments):
    return waiting.run(sys.executable, "-m", f"launch.{program}", *arguments)


@pytest.mark.parametrize("path", PROGRAMS, ids=module_of)
def test_help_shows_each_line_as_it_is_written(path):
    """A backslash at the end of a line of a shell is kept: Python would join it with the next."""
    [about, *_] = ast.parse(path.read_text()).body
    assert about.value.value.count("\n") == about.end_lineno - about.lineno


def test_words_that_no_flag_takes_are_refused():
    """Such as the rest of a prompt without quotes."""
    done = run("evaluate", "--workdir=x", "two", "words")
    assert done.returncode == 2 and done.stderr.startswith("error: 'two' is not a flag")


def test_every_program_that_is_told_of_can_be_started():
    """It is a file or a package with a `__main__`, and not both."""
    code = (path for room in ("launch", "experiments") for path in (ROOT / room).rglob("*.py"))
    told = set()
    for path in (*ROOT.glob("*.md"), ROOT / "Makefile", *code):
        told.update(re.findall(r"python -m ((?:launch|experiments)\.\w+)", path.read_text()))
    assert len(told) > 12
    for module in told:
        path = ROOT / module.replace(".", "/")
        found = [path.with_suffix(".py").is_file(), (path / "__main__.py").is_file()]
        assert sum(found) == 1, module


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
from launch.common import cli
def main(_):
    for _ in range(100_000):
        print("4 × 4 → ±é–", flush=True)
cli.run(main)
"""


def test_no_character_and_no_reader_that_leaves_ends_a_program_in_a_traceback():
    """What the encoding lacks is escaped; and `| head -1` ends it without a word."""
    done = waiting.run(
        "bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, MANY_LINES,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
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
        ("model.passes", "an integer"), ("model.unroll", "of type bool"),
        ("task.nodes", "an integer"), ("task.window", "an integer"),
        ("training.clip_norm", "of type float"), ("evaluation.passes", "of type tuple"),
    ):  # fmt: skip
        values = parsed(monkeypatch, file, f"--config.{path}=None")
        with pytest.raises(ConfigError, match=f"{path} must be {kind}; got None"):
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


@pytest.mark.parametrize("value", ["3", "None"])
def test_a_field_of_another_task_is_refused_with_the_nearest_that_is_there(monkeypatch, value):
    file = f"--config={ROOT / 'experiments' / 'depo_small.py'}"
    told = r"^--config\.task\.page: no such field; the nearest is --config\.task\.name$"
    with pytest.raises(ConfigError, match=told):
        parsed(monkeypatch, file, "--config.model.passes=2", f"--config.task.page={value}")


# Paths.

# Flags and fields of text that name no file or folder; all others do.
WORDS = {
    "accelerator", "bucket", "coordinator_address", "grid", "name", "only", "project", "prompt",
    "random", "runtime_version", "topology", "zone",
}  # fmt: skip
WORD_FIELDS = {
    "backend", "compute_dtype", "conv_init", "eviction", "fingerprints", "gather",
    "matmul_precision", "mlp", "name", "on_bad_step", "on_save_error", "param_dtype", "pattern",
    "remat", "rule", "schedule", "special_tokens", "text_field",
}  # fmt: skip
URLS = {
    "gs://bucket/run": "gcsfuse --implicit-dirs bucket /mnt/bucket.* such as /mnt/bucket/run",
    "gs:/bucket/run": "such as /mnt/bucket/run",  # as pathlib writes it
    "S3://bucket": "mount what s3:// names .* such as /mnt/bucket",
    "hdfs://node/run": "such as /mnt/node/run",
    "file:///data/run": "the nearest is /data/run",
}


def defined(path, *names):
    """Names of the flags that a file defines by functions of these names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in names and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


PATH_FLAGS = [
    pytest.param(path, name, id=f"{module_of(path)} {name}")
    for path in PROGRAMS
    for name in ("config", *defined(path, "define_path", "define_paths"))
    if name != "config" or "define_config" in path.read_text()
]


def test_every_flag_of_a_program_is_a_path_or_is_known_as_a_word():
    """A path that is read as mere text would take URLs for folders, and ~ for a name."""
    for room in ("launch", "experiments"):
        for path in (ROOT / room).rglob("*.py"):
            text = {*defined(path, "DEFINE_string", "DEFINE_multi_string")}
            assert text <= WORDS, (
                f"{path}: take cli.define_path for {text - WORDS}, or add to WORDS"
            )
    assert len(PATH_FLAGS) > 20 and len(PROGRAMS) > 12


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_no_path_and_the_one_to_give_is_named(url):
    with pytest.raises(ConfigError, match=f"^a URL is not a path.*{URLS[url]}"):
        local_path(url)


def test_a_home_is_expanded_and_one_that_is_unknown_is_told(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~") == "/home/me" and local_path("~/run") == "/home/me/run"
    user = pwd.getpwuid(os.getuid())
    assert local_path(f"~{user.pw_name}/run") == f"{user.pw_dir}/run"
    for path in (
        "run", "/data/run", "runs/~/x", "./~", "data/*.jsonl", "x=a:b", "C:/run", "bytes",
        "depo.py:/data/x", "host:/x",
    ):  # fmt: skip
        assert local_path(path) == path
    with pytest.raises(ConfigError, match="there is no user 'no-such-user' here; give the path"):
        local_path("~no-such-user/run")
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match="your home is unknown"):
        local_path("~/run")
    with pytest.raises(ConfigError, match="the path is empty"):
        local_path("")


def test_a_program_refuses_a_url_in_a_line_and_makes_nothing(tmp_path):
    done = run("train", "--config=experiments/depo_small.py", "--workdir=gs://bucket/run")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch("error: flag --workdir=gs://bucket/run: a URL is not .*\n", done.stderr)
    assert not (ROOT / "gs:").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "flag"), PATH_FLAGS)
def test_every_program_expands_or_refuses_every_path(path, flag):
    """~user is one that is not there, so that what is expanded is refused, too."""
    module = module_of(path)
    for given, reason in (("gs://b/x", "a URL is not a path"), ("~nobody-/x", "there is no user")):
        done = waiting.run(sys.executable, "-m", module, f"--{flag}={given}")
        assert done.returncode == 2 and not done.stdout
        prefix = "" if flag == "config" else "flag "
        assert done.stderr.startswith(f"error: {prefix}--{flag}={given}: {reason}"), done.stderr
        assert done.stderr.count("\n") == 1


def test_a_config_file_in_the_home_is_found(tmp_path, monkeypatch):
    """And what a command is told behind two dashes stays as it is, for where it will run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("def get_config(): ...")
    for given, expected in (
        (["--config=~/mine.py:fast"], [f"--config={tmp_path}/mine.py:fast"]),
        (["--config", "~/mine.py", "x"], ["--config", f"{tmp_path}/mine.py", "x"]),
        (["--", "--config=~/mine.py"], ["--", "--config=~/mine.py"]),
    ):
        assert cli.with_config_path(["program", *given]) == ["program", *expected]
    with pytest.raises(ConfigError, match=r"--config=gs://b/x.py: a URL is not a path"):
        cli.with_config_path(["program", "--config=gs://b/x.py"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine.py", "No such file or directory"),
        ("x" * 300 + ".py", "File name too long"),
        ("x" * 300 + "/mine.py", "File name too long"),
        ("folder.py", "it is a folder"),
        ("pipe.py", "it is a pipe"),
        ("locked.py", "Permission denied"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_told_with_those_that_can(
    tmp_path, monkeypatch, name, reason
):
    """Whatever else ends in .py beside it."""
    for file in ("theirs.py", "locked.py"):
        (tmp_path / file).write_text("def get_config(): ...")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "dangling.py").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    read = pathlib.Path.read_bytes  # which takes no mode for root

    def refused(path):
        if path.name == "locked.py":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", refused)
    beside = name != "folder.py" and "/" not in name  # a folder is looked into
    known = tmp_path / "theirs.py" if beside else "experiments/depo_small.py"
    with pytest.raises(ConfigError) as error:
        cli.with_config_path(["program", f"--config={tmp_path / name}"])
    assert str(error.value) == (
        f"--config={tmp_path / name} cannot be read ({reason}); there are: {known}; "
        f"the nearest is {known}"
    )


# Fields of the config.


def text_fields(section):
    return [field for field in dataclasses.fields(section)
            if field.type in (str, tuple[str, ...]) and field.name not in WORD_FIELDS]  # fmt: skip


SECTIONS = [
    ModelConfig,
    TrainingConfig,
    EvaluationConfig,
    MeshConfig,
    *(config for config, _ in TASKS.values()),
]


@pytest.mark.parametrize(
    ("section", "field"),
    [
        pytest.param(section, field, id=f"{section.__name__}.{field.name}")
        for section in SECTIONS
        for field in text_fields(section)
    ],
)
def test_every_field_that_is_a_path_is_expanded_or_refused(section, field, monkeypatch):
    """A new field of text is a path, or is added to WORD_FIELDS."""
    monkeypatch.setenv("HOME", "/home/me")

    def given(path):
        value = path if field.type is str else ("data/x.jsonl", path)
        made = getattr(section(**{field.name: value}), field.name)
        return made if field.type is str else made[-1]

    assert given("~/data/*.jsonl") == "/home/me/data/*.jsonl"
    with pytest.raises(ConfigError, match=f"^{field.name}='gs://b/x.jsonl': a URL is not a path"):
        given("gs://b/x.jsonl")
    with pytest.raises(ConfigError, match=f"^{field.name}='~nobody-/x': there is no user"):
        given("~nobody-/x")
