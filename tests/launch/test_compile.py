"""What `launch.compile` promises: what a run needs is known before its devices are."""

import dataclasses
import functools
import json
import sys

import jax
import pytest
import waiting

from launch.common.chips import CHIPS
from launch.compile import pods, report, rows, topologies
from launch.compile.topologies import Topology
from sleepnet import storage, tasks
from sleepnet.config import ConfigError, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import Rule110Config
from sleepnet.training.step import init_train_state

TASK = Rule110Config(cells=62, window=64, strings=1, questions=1)
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=8, pattern="AG", d_model=32, num_heads=2, window=64, passes=2, chunk=16
    ),
    task=TASK,
    training=TrainingConfig(steps=4, batch_size=64),
    mesh=MeshConfig(fsdp=8),
)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
        yield


@functools.cache
def found(topology="cpu:8"):
    return report.report(CONFIG, topology)


def row_of(step):
    return next(row for row in found().rows if row.step.startswith(step))


@pytest.mark.slow
def test_every_step_is_a_row_that_fits():
    assert [row.step for row in found().rows] == ["train", "wake 8 rows", "sleep over 8"]
    assert found().fits


@pytest.mark.slow
def test_the_state_of_a_device_is_its_share():
    """Parameters and what the optimizer keeps: at most 1.1 / 8 of all, and what XLA takes as
    arguments is just them and the batch."""
    state = init_train_state(CONFIG.model, CONFIG.training)
    total = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    sizes = row_of("train").bytes
    assert sizes["parameters"] + sizes["optimizer"] <= 1.1 * total / 8
    batch = next(tasks.batches(tasks.make(TASK), "train", 64, num_batches=1))
    assert sizes["batch"] == sum(x.nbytes for x in jax.tree.leaves(batch)) / 8


@pytest.mark.slow
@pytest.mark.parametrize("step", ["train", "wake"])
def test_flops_of_the_program_are_those_of_the_formula(step):
    """Of a training step within 10%: its optimizer and what the backward pass of the rule computes
    again are on top; of a token within 5%."""
    row = row_of(step)
    assert row.flops is not None
    assert row.flops == pytest.approx(row.model_flops, rel=0.1 if step == "train" else 0.05)


def promised(**changes):
    """CPUs for which something is promised, so that there is a bound and an end of memory."""
    chip = dataclasses.replace(CHIPS["v5e"], wraps=8, axes=1, **changes)
    return Topology("cpu:8", tuple(jax.devices()[:8]), chip)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [({"flops": 1e6}, "FLOP"), ({"hbm_rate": 1e3}, "HBM"), ({"ici_rate": 1.0}, "ICI")],
)
def test_the_bound_is_the_slowest_of_three(changes, bound, monkeypatch):
    """Each with its time at the peak rate; what lifts it is said where it is not the products."""
    monkeypatch.setattr(topologies, "topology", lambda name: promised(**changes))
    result = report.report(CONFIG, "cpu:8", steps=["sleep"])
    (row,) = result.rows
    assert row.bound == bound
    assert row.seconds[bound] == max(row.seconds.values()) > 1e-3
    assert ("what lifts it" in result.text()) == (bound != "FLOP")


def test_what_does_not_fit_says_what_would_help(monkeypatch):
    """Known from the arguments' shapes already, before anything compiles."""
    monkeypatch.setattr(topologies, "topology", lambda name: promised(hbm=1e4))
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2))
    result = report.report(config, "cpu:8", steps=["train"])
    assert not result.fits
    (row,) = result.rows
    assert row.problem is not None and row.compile_seconds < 1
    assert f"{row.problem}; try {row.help}" in result.text()
    assert row.help == (
        "mesh.fsdp=4, or model.remat=window+pass+block (now without window, pass, block), "
        "or training.parts=2"
    )


@pytest.mark.parametrize(
    ("name", "rate"),
    [("v5e:2x4", 100e9), ("v5e:16x16", 200e9), ("v5p:2x2x2", 300e9), ("v5p:4x4x4", 600e9)],
)
def test_a_slice_without_rings_has_half_of_the_links(name, rate):
    assert Topology(name, (), CHIPS[name[:3]]).ici_rate == rate


@pytest.mark.parametrize(
    ("name", "nearest"), [("v5e:4x4x", "v5e:4x4"), ("v5:16x16", "v5e:16x16"), ("cpu", "cpu:8")]
)
def test_an_unknown_topology_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"nearest is '{nearest}'"):
        topologies.topology(name)


@pytest.mark.slow
def test_the_page_of_pods_has_all_rows_and_names_those_that_miss():
    """A star marks those that were compiled with least effort."""
    record = found().to_dict() | {
        "date": "2026-11-24",
        "machine": {},
        "seconds": 1.0,
        "libtpu": "0",
    }
    records = {"a": record | {"quick": False}, "b": record | {"quick": True}}
    page = pods.page(json.loads(json.dumps(records)), ["a", "b", "c"])
    for row in ("a train", "a wake 8 rows", "b* sleep over 8"):
        assert page.count(f" {row} |") >= 3
    assert "Not compiled yet: c." in page


def test_a_row_is_compiled_again_once_its_experiment_has_changed(tmp_path):
    """What lies in the folder counts only if it was compiled from the present config."""
    pod, path = rows.PODS[0], tmp_path / "pod.json"
    assert not pod.is_done(path, quick=True)
    config = pod.config().to_dict()
    for least_effort in (False, True):
        storage.write_json(path, {"quick": least_effort, "config": config})
        assert pod.is_done(path, quick=True)
        assert pod.is_done(path, quick=False) != least_effort
    config["training"]["batch_size"] *= 2
    storage.write_json(path, {"quick": False, "config": config})
    assert not pod.is_done(path, quick=True)
    config["training"]["no_more"] = 1
    storage.write_json(path, {"quick": False, "config": config})
    assert not pod.is_done(path, quick=True)


def compile_(*arguments):
    return waiting.run(sys.executable, "-m", "launch.compile", *arguments)


def test_the_command_prints_a_table_and_writes_it(tmp_path):
    done = compile_(
        "--config=experiments/depo_small.py", "--topology=cpu:1", "--step=wake", "--rows=2",
        f"--json={tmp_path / 'fit.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wake 2 rows" in done.stdout
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["fits"] and record["config"]["task"]["name"] == "depo"
    assert [step["step"] for step in record["steps"]] == ["wake 2 rows"]


def test_a_mesh_that_the_topology_does_not_take_is_refused():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=5))
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=5: it must divide the 8 devices"):
        report.report(config, "cpu:8", steps=["train"])
