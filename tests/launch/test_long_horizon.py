"""The page of `launch.long_horizon` says what `forgetting` measures, run by run."""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
import waiting

from sleepnet.config import EvaluationConfig, ModelConfig, TrainingConfig
from sleepnet.evaluation.forgetting import forgetting
from sleepnet.evaluation.intervals import student_t
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import FactsConfig
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.step import make_init
from sleepnet.training.workdir import claim_workdir, load_params

ROOT = pathlib.Path(__file__).parent.parent.parent
TASK = FactsConfig(depths=(1, 2), keys=4, values=4, noise=2, facts=2, window=4)
MODEL = ModelConfig(vocab_size=11, pattern="AG", d_model=8, num_heads=2, window=4, passes=1)
TRAINING = TrainingConfig(steps=2, batch_size=2, warmup_steps=0)
PLAIN = ExperimentConfig(
    model=MODEL, task=TASK, training=TRAINING, evaluation=EvaluationConfig(examples=20)
)
WHOLE = dataclasses.replace(
    PLAIN,
    task=dataclasses.replace(TASK, window=12, page=4),
    model=dataclasses.replace(MODEL, pattern="AA", window=12),
    training=dataclasses.replace(TRAINING, steps=4),
)


def of_seed(config, seed):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Its folder, and the workdirs with their configs: two seeds of a hybrid, and attention that
    is given twice as many tokens."""
    folder = tmp_path_factory.mktemp("long_horizon")
    runs = {"n1": PLAIN, "n1_again": of_seed(PLAIN, 1), "whole": WHOLE}
    for name, config in runs.items():
        claim_workdir(config, folder / name)
        with jax.numpy_dtype_promotion("standard"):
            Checkpoints(folder / name).save(make_init(config, None)(), wait=True)
    workdirs = {folder / name: config for name, config in runs.items()}
    done = run(folder / "page", workdirs, "--distances=2,5,9", "--farthest_of_all=5")
    assert done.returncode == 0, done.stderr
    return folder / "page", workdirs


def run(out, workdirs, *arguments):
    named = [f"--workdir={workdir}" for workdir in workdirs]
    return waiting.run(
        sys.executable, "-m", "launch.long_horizon", f"--out={out}", *arguments, *named
    )


def test_a_line_is_the_mean_over_seeds_and_marks_what_was_never_trained(page):
    out, runs = page
    plain = np.array([
        [row.accuracy for row in forgetting(load_params(workdir, None)[0], config, (2, 5, 9))]
        for workdir, config in runs.items()
        if config.model.pattern == "AG"
    ])  # fmt: skip
    text = (out / "report.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {row[0].strip("*"): row for row in cells if row and row[0].strip("*").isdigit()}
    for distance, shares in zip(("2", "5", "9"), plain.T, strict=True):
        mean = student_t(shares.tolist()).mean
        assert rows[distance][2].strip("*").startswith(f"{mean:.3f} [")
        assert rows[distance][0].startswith("*") == (distance != "2")
    assert rows["9"][3].strip("*") == "–"  # beyond what attention is asked
    assert "whole cache, 2 x the tokens (seeds: 1)" in text and (out / "forgetting.png").exists()


def test_the_figures_stand_in_a_file(page):
    out, _ = page
    record = json.loads((out / "results.json").read_text())
    assert record["trained"] == 2
    assert {name: len(seeds) for name, seeds in record["runs"].items()} == {
        "hybrid, N = 1": 2, "whole cache, 2 x the tokens": 1,
    }  # fmt: skip


def test_what_was_measured_is_not_measured_twice_and_costs_stand_beside_it(page, tmp_path):
    _, runs = page
    (workdir, *_) = runs
    file = workdir / "forgetting.json"
    stored = json.loads(file.read_text())
    stored["results"]["5"]["accuracy"] = 0.123
    file.write_text(json.dumps(stored))
    costs = ROOT / "experiments/results/benchmarks/horizon.json"
    done = run(tmp_path / "again", [workdir], "--distances=5,3", f"--costs={costs}")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\d+ pages back$", done.stdout, re.M) == ["3 pages back"]
    text = (tmp_path / "again" / "report.md").read_text()
    assert "*0.123*" in text and "## What a token costs" in text
    p50 = json.loads(costs.read_text())["rows"][-1]["ms p50"]
    assert f"| {p50:.3g} |" in " ".join(text.split())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task": dataclasses.replace(TASK, keys=3)}, "task.keys is 4 and 3"),
        ({"model": dataclasses.replace(MODEL, d_model=16)}, "model.d_model is 8 and 16"),
    ],
)
def test_what_cannot_be_compared_is_refused(page, tmp_path, changes, field):
    """Other facts; or, under the same name, another model."""
    _, runs = page
    claim_workdir(dataclasses.replace(PLAIN, **changes), tmp_path / "other")
    done = run(tmp_path / "page", [*runs, tmp_path / "other"])
    assert done.returncode == 2 and field in done.stderr
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--distances=2,x", "--distances must be whole numbers of 1 or more"),
        ("--distances=0", "got 0"),
        ("--costs=nowhere.json", "nowhere.json does not exist"),
        ("--costs=experiments/results/benchmarks/wake.json", "is of 'wake'"),
    ],
)
def test_bad_flags_are_answered_in_a_line(page, tmp_path, argument, message):
    _, runs = page
    done = run(tmp_path / "page", runs, argument)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "page").exists()
