"""The report, from workdirs written by hand."""

import dataclasses
import itertools
import json
import shutil

import pytest

from sleepnet import storage
from sleepnet.evaluation import record
from sleepnet.evaluation.report import report
from sleepnet.storage import StorageError

PNGS = ["accuracy_by_depth", "learning_curves", "passes_at_test", "sleep_latency", "wake_latency"]
SEEDED = {0: 0.70, 1: 0.80, 2: 0.90}


def write_run(workdir, config, *, seed=0, passes=1, accuracy=0.5, step=40, latency=True, **model):
    workdir.mkdir()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, passes=passes, **model),
        training=dataclasses.replace(config.training, seed=seed),
    )
    storage.write_json(workdir / "config.json", config.to_dict())
    rows = [
        {"step": s, "tokens": 100 * s, "flops": 7e6 * s, "loss": 2 / s, "accuracy": s / 50}
        for s in (10, 20, 30, 40, 50)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {10: 4.0, 20: 8.0, 30: 10.0, 40: 13.0, 50: 17.0}
    timing = [{"step": s, "seconds": seconds[s], "tokens_per_second": 1.0} for s in seconds]
    (workdir / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    start = {"command": ["train.py", f"--config.training.seed={seed}", "--workdir=a b"]}
    (workdir / "starts.jsonl").write_text(2 * (json.dumps(start) + "\n"))
    measured = {"measured": record.identity({}, config)}
    record.save(workdir, evaluation_of(passes, accuracy, step, latency) | measured)
    return workdir


def evaluation_of(trained, accuracy, step, latency):
    def result(passes, depth):
        shares = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": 1.0}
        exact = {"exact": 0.25, "exact_low": 0.2, "exact_high": 0.3}
        floors = {"floor": 1 / 7, "exact_floor": 0.05 if depth else None}
        counts = {"passes": passes, "depth": depth, "examples": 150, "answers": 300}
        return counts | shares | exact | floors

    timing = {"median_ms": 2.0, "p90_ms": 3.0}
    timings = {
        "batch_size": 1,
        "prefill": timing,
        "wake": [{"passes": N, "windows": w, **timing} for N in (1, 2) for w in (0, 64)],
        "sleep": [{"passes": N, **timing} for N in (1, 2, 4)],
    }
    agreed = {"passes": trained, "examples": 3, "max_nll": 2.0, "max_nll_difference": 1e-6}
    machine = {"cpu": "abacus", "cores": 2, "device": "cpu", "devices": 1}
    return {
        "version": record.VERSION,
        "step": step,
        "trained_passes": trained,
        "split": "test",
        "depth_name": "hops",
        "request": {"passes": [1, 2], "examples": 150, "streaming_examples": 3},
        "results": [result(N, depth) for N in (1, 2) for depth in (1, 2, None)],
        "agreement": agreed | {"equal_predictions": 1.0},
        "latency": timings if latency else None,
        "machine": machine | {"jax": "0.0", "python": "3"},
    }


@pytest.fixture
def workdirs(tmp_path, config):
    """Three seeds at N = 1 and one at N = 2."""
    three = [
        write_run(tmp_path / f"n1s{seed}", config, seed=seed, accuracy=share)
        for seed, share in SEEDED.items()
    ]
    return [*three, write_run(tmp_path / "n2s0", config, passes=2, accuracy=0.95)]


def test_results_hold_means_over_seeds_with_their_intervals(workdirs, tmp_path):
    returned = report(workdirs, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == json.loads(json.dumps(returned))
    (group,) = stored["groups"]
    assert group["names"] == ["N = 1", "N = 2"]

    rows = {(row["trained"], row["passes"], row["depth"]): row for row in group["results"]}
    assert set(rows) == set(itertools.product((1, 2), (1, 2), (1, 2, None)))
    over_seeds = rows[1, 1, 2]
    half = 4.303 * 0.1 / 3**0.5  # s = 0.1
    assert over_seeds["seeds"] == [0, 1, 2]
    assert over_seeds["accuracy"].pop("values") == [0.7, 0.8, 0.9]
    expected = {"mean": 0.8, "low": 0.8 - half, "high": 1.0}
    assert over_seeds["accuracy"] == pytest.approx(expected, abs=1e-4)
    one_seed = rows[2, 2, 1]["accuracy"]
    assert one_seed == {"mean": 0.95, "low": 0.85, "high": 1.0, "values": [0.95]}


def test_what_is_measured_can_be_reported(config, params, tmp_path):
    """Times too: with nothing written by hand between the one and the other."""
    workdir = write_run(tmp_path / "run", config, passes=config.model.passes)
    asked = record.widen(config, (1,), examples=9)
    record.save(workdir, measured := record.measure(params, asked, step=40))
    (group,) = report([workdir], tmp_path / "out")["groups"]
    for name in ("wake", "sleep"):
        assert sorted(group["latency"][name], key=str) == sorted(measured["latency"][name], key=str)
    assert group["latency"]["prefill"] == measured["latency"]["prefill"]
    shares = [row["accuracy"] for row in measured["results"]]
    assert sorted(row["accuracy"]["mean"] for row in group["results"]) == sorted(shares)
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == PNGS


def test_costs_are_those_up_to_the_evaluated_step(workdirs, tmp_path):
    (group,) = report(workdirs, tmp_path / "out")["groups"]
    for run in group["runs"]:
        assert (run["tokens"], run["flops"], run["seconds"]) == (4000, 2.8e8, 13.0)
    curve = group["curves"][0]
    assert curve["step"] == [10, 20, 30, 40]
    smoothed = [0.4, 0.5, 0.5, 0.6]  # of 0.2 0.4 0.6 0.8, over up to two rows on each side
    assert curve["accuracy"]["mean"] == pytest.approx(smoothed)


def test_all_files_are_there_and_the_same_the_second_time(workdirs, tmp_path):
    out = tmp_path / "out"
    report(workdirs, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(first) == sorted([*(f"{p}.png" for p in PNGS), "report.md", "results.json"])
    text = first["report.md"].decode()
    for said in ("0.800 [0.552, 1.000]", "0.143", "abacus", "13 s", "100.00%", "4k", "2.80e+08"):
        assert said in text
    for name in PNGS:
        assert first[f"{name}.png"].startswith(b"\x89PNG")
        assert f"]({name}.png)" in text
    given = " ".join(f"--workdir={workdir}" for workdir in workdirs)
    for command in (
        "python -m launch.train --config.training.seed=2 '--workdir=a b'",
        f"python -m launch.evaluate {given} --passes=1,2 --examples=150 --step=40 --again",
        f"python -m launch.report {given} --out={out}",
    ):
        assert command in text.splitlines()
    report(workdirs, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_runs_that_differ_otherwise_are_told_apart(workdirs, tmp_path, config):
    gelu = write_run(tmp_path / "swiglu", config, mlp="swiglu", latency=False)
    results = report([*workdirs, gelu], tmp_path / "out")
    assert [len(group["runs"]) for group in results["groups"]] == [4, 1]
    assert results["groups"][1]["latency"] is None
    assert "model.mlp=swiglu" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "group2_accuracy_by_depth.png").exists()
    assert not (tmp_path / "out" / "group2_wake_latency.png").exists()


def test_runs_that_differ_in_the_passes_of_gradients_are_compared(workdirs, tmp_path, config):
    """In one group, one line each; k = N is no other run than that of all passes."""
    last = write_run(tmp_path / "k1", config, passes=2, accuracy=0.9, gradient_passes=1)
    every = write_run(tmp_path / "k2", config, passes=2, seed=1, accuracy=0.75, gradient_passes=2)
    (group,) = report([*workdirs, last, every], tmp_path / "out")["groups"]
    assert group["names"] == ["N = 1", "N = 2, k = 1", "N = 2"]
    means = {
        row["name"]: row["accuracy"]["mean"] for row in group["results"]
        if row["passes"] == row["trained"] and row["depth"] == 1
    }  # fmt: skip
    assert means == pytest.approx({"N = 1": 0.8, "N = 2, k = 1": 0.9, "N = 2": 0.85})
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| N = 2, k = 1 |" in text and "the last k of a window's N passes" in text


def test_a_run_that_was_not_evaluated_names_the_command(workdirs, tmp_path):
    (workdirs[1] / "evaluation.json").unlink()
    with pytest.raises(StorageError, match=f"launch.evaluate --workdir={workdirs[1]}"):
        report(workdirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_measurements_of_another_run_are_not_reported(workdirs, tmp_path):
    """Such as those in a folder that was copied and trained with another seed."""
    shutil.copy(workdirs[0] / "evaluation.json", workdirs[1])
    with pytest.raises(StorageError, match=r"another run \(training.seed was 0 and is 1\)"):
        report(workdirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("twin", "complaint"),
    [({"seed": 0}, "are the same run"), ({"seed": 9, "step": 30}, "evaluate both at one")],
    ids=["given twice", "another step"],
)
def test_runs_that_cannot_be_averaged_are_refused(workdirs, tmp_path, config, twin, complaint):
    other = write_run(tmp_path / "other", config, **twin)
    with pytest.raises(StorageError, match=complaint):
        report([*workdirs, other], tmp_path / "out")
