"""What a person at the command line sees: clear errors before anything compiles, and signals."""

import json
import signal
import sys

import pytest
import waiting

CONFIG = "--config=experiments/depo_small.py"
TINY = [
    CONFIG,
    "--config.model.pattern=G",
    "--config.model.d_model=8",
    "--config.model.passes=1",
    "--config.model.unroll=False",
    "--config.evaluation.passes=1",
    "--config.mesh.data=1",
    "--config.training.steps=100000",
    "--config.training.batch_size=2",
    "--config.training.log_every=1",
]


def command(*arguments, program="train"):
    return [sys.executable, "-m", f"launch.{program}", *map(str, arguments)]


def run(*arguments, program="train"):
    return waiting.run(*command(*arguments, program=program))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ([CONFIG, "--config.model.pases=4"], "nearest is --config.model.passes"),
        ([CONFIG, "--config.model.rule=gated_dleta"], "the nearest is 'gated_delta'"),
        ([CONFIG, "--config.model.passes=0"], "passes must be above 0; got 0"),
        ([CONFIG, "--config.model.pattern=AXG"], "the nearest is 'AG'"),
        ([CONFIG, "--config.model.window=9"], "leave model.window out"),
        (["--config=experiments/depo_smal.py"], "the nearest is experiments/depo_small.py"),
        ([CONFIG, "--workdri=x"], "Did you mean: workdir"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_bad_command_is_answered_with_the_nearest_good_one(wrong, expected, tmp_path):
    """Exit code 2, one line, and no workdir is made."""
    done = run(*wrong, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_leaves_no_workdir_behind(tmp_path):
    done = run(CONFIG, "--config.mesh.data=3", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "mesh.data=3: training.batch_size=64 is no multiple of 3 x 1" in done.stderr
    assert "; allowed: 1, 2, 4, 8; the nearest is 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run(CONFIG, f"--workdir={tmp_path / 'file'}")
    assert done.returncode == 2
    assert f"cannot write to {tmp_path / 'file'}" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_evaluating_a_folder_without_a_run_says_so(tmp_path):
    done = run(f"--workdir={tmp_path}", program="evaluate")
    assert done.returncode == 2
    assert "is no workdir of a run" in done.stderr


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    """Exit code 128 + 15; the checkpoint holds the last step, and is measured even where the
    kernel that it was trained with is not; another config is refused."""
    first = waiting.Program(*command(*TINY, f"--workdir={tmp_path}"))
    metrics = tmp_path / "metrics.jsonl"
    waiting.until(lambda: metrics.exists() and metrics.stat().st_size, "a row of metrics", first)
    first.send(signal.SIGTERM)
    done = first.end()
    assert done.returncode == 128 + signal.SIGTERM, done
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert f"stopped at step {max(saved)} and saved" in done.stdout
    start = json.loads((tmp_path / "starts.jsonl").read_text())
    assert start["seed"] == 0 and "jax" in start["versions"]
    assert start["command"] == ["train.py", *TINY, f"--workdir={tmp_path}"]

    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["backend"] = "pallas"
    (tmp_path / "config.json").write_text(json.dumps(config))
    measured = run(f"--workdir={tmp_path}", "--examples=8", "--nolatency", program="evaluate")
    assert measured.returncode == 0, measured.stderr
    assert "model.backend='pallas' is not for here: measured by xla" in measured.stdout

    other = run(*TINY, "--config.training.seed=1", f"--workdir={tmp_path}")
    assert other.returncode == 2
    assert "training.seed=0, and this one has 1" in other.stderr
