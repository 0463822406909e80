"""A run ends the same however often it stopped, and nothing that it saved is lost."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleepnet import storage, tasks
from sleepnet.config import ConfigError, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.nn.model import init_params
from sleepnet.storage import StorageError
from sleepnet.tasks import DepoConfig
from sleepnet.training import checkpoint, loop
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.metrics import METRICS, read_metrics, read_rows
from sleepnet.training.step import init_train_state, make_train_step
from sleepnet.training.workdir import claim_workdir, load_config, locked

TASK = DepoConfig(nodes=4, symbols=4, hops=2, queries=2, window=4, test_fraction=0.5)
MODEL = ModelConfig(vocab_size=6, pattern="G", d_model=8, num_heads=1, window=4, passes=2)
TRAINING = TrainingConfig(
    steps=6, batch_size=4, log_every=1, checkpoint_every=2, checkpoints_kept=2
)
ONE_DEVICE = MeshConfig(data=1)
CONFIG = ExperimentConfig(model=MODEL, task=TASK, training=TRAINING, mesh=ONE_DEVICE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted: its final state and its workdir."""
    workdir = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        return loop.train(CONFIG, workdir), workdir


@pytest.fixture
def copied(finished, tmp_path):
    """A workdir of one's own to damage."""
    return shutil.copytree(finished[1], tmp_path / "run")


class StopAt:
    """As a signal in some phase of some step; arguments of `train`."""

    def __init__(self, phase, step):
        self.where, self.asked = (phase, step), False

    def arguments(self):
        return {"on_phase": self.enter, "should_stop": lambda: self.asked}

    def enter(self, phase, step):
        self.asked = self.asked or (phase, step) == self.where


def assert_same_state(state, reference):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stopped_twice_and_resumed_it_ends_bit_equal(finished, tmp_path):
    first = loop.train(CONFIG, tmp_path, **StopAt("step", 3).arguments())
    assert int(first.step) == 3
    second = loop.train(CONFIG, tmp_path, **StopAt("data", 5).arguments())
    assert int(second.step) == 5
    assert_same_state(loop.train(CONFIG, tmp_path), finished[0])
    assert (tmp_path / METRICS).read_bytes() == (finished[1] / METRICS).read_bytes()


def test_a_run_stopped_while_it_is_measured_keeps_the_same_best_checkpoint(tmp_path):
    """Of the step at which it stopped, too, which was saved before it was rated; and the same
    rows."""
    training = dataclasses.replace(
        TRAINING, evaluate_every=2, evaluate_examples=8, best_kept=1, checkpoints_kept=1
    )
    config = dataclasses.replace(CONFIG, training=training)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.train(config, whole)
    rated = {row["step"]: row["test_accuracy"] for row in read_metrics(whole) if "test_loss" in row}
    best = max(rated, key=lambda step: (rated[step], step))
    assert Checkpoints(whole).steps() == sorted({best, 6})
    loop.train(config, stopped, **StopAt("evaluate", best).arguments())
    loop.train(config, stopped)
    assert Checkpoints(stopped).steps() == Checkpoints(whole).steps()
    assert (stopped / METRICS).read_bytes() == (whole / METRICS).read_bytes()


def test_killed_after_a_checkpoint_it_repeats_the_lost_steps(finished, copied):
    """Rows written after the checkpoint that it goes back to are not doubled."""
    shutil.rmtree(copied / "checkpoints" / "6")
    with (copied / METRICS).open("a") as file:
        file.write('{"step": 7, "lo')  # cut short by the kill
    assert_same_state(loop.train(CONFIG, copied), finished[0])
    assert read_rows(copied / METRICS) == read_rows(finished[1] / METRICS)


def test_a_finished_run_is_not_trained_again(finished, copied):
    before = (copied / METRICS).read_bytes()
    assert_same_state(loop.train(CONFIG, copied), finished[0])
    assert (copied / METRICS).read_bytes() == before


def test_only_the_newest_checkpoints_stay(finished):
    assert Checkpoints(finished[1]).steps() == [4, 6]


def test_a_damaged_checkpoint_is_named_kept_and_passed_over(finished, copied):
    largest = max((copied / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    notices = []
    state = loop.train(CONFIG, copied, on_notice=notices.append)
    assert_same_state(state, finished[0])
    assert any("damaged-checkpoint-6" in notice for notice in notices)
    assert (copied / "damaged-checkpoint-6").is_dir()


def kept(workdir):
    """All that a run has made, without the signs of its life."""
    signs = workdir / "heartbeats", workdir / "clock.json"
    files = (path for path in workdir.rglob("*") if path.is_file())
    return {p: p.read_bytes() for p in files if p not in signs and p.parent not in signs}


def test_where_no_checkpoint_can_be_read_nothing_is_touched(copied):
    """Neither checkpoints nor metrics: training does not start anew over them."""
    for file in (copied / "checkpoints").rglob("*"):
        if file.is_file() and "params" in file.parts:
            file.write_bytes(b"")
    before = kept(copied)
    with pytest.raises(
        StorageError, match=r"none of the 2 checkpoints .* can be read; all are left"
    ):
        loop.train(CONFIG, copied)
    assert kept(copied) == before


def test_a_machine_without_memory_says_nothing_of_the_checkpoint(finished, copied, monkeypatch):
    """What is no fault of the files passes through, and they stay."""

    def fail(*_, **__):
        raise MemoryError

    checkpoints = Checkpoints(copied)
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    with pytest.raises(MemoryError):
        checkpoints.restore_latest(finished[0])
    assert checkpoints.steps() == [4, 6]


def test_a_digest_catches_what_the_format_does_not(finished, copied):
    """Arrays that read back well but are not those that were written are refused by name."""
    file = copied / "checkpoints" / "6" / "record" / "data.json"
    record = storage.unseal(storage.read_json(file), "record")
    record["digests"][".params['head']"] = f"float32[8,6]:{0:032x}"
    storage.write_json(file, storage.seal(record))
    with pytest.raises(StorageError, match=r"params\['head'\] is damaged"):
        Checkpoints(copied).restore(finished[0], 6)


def test_a_damaged_row_of_metrics_is_named_and_none_is_lost(copied):
    rows = (copied / METRICS).read_text().splitlines()
    rows[1] = rows[1][:10]
    (copied / METRICS).write_text("\n".join(rows))
    with pytest.raises(StorageError, match=r"metrics\.jsonl, line 2 is damaged"):
        loop.train(CONFIG, copied)
    assert (copied / METRICS).read_text().splitlines() == rows


def test_a_checkpoint_of_another_model_is_refused(finished):
    other = dataclasses.replace(MODEL, d_model=12, head_dim=12, key_dim=12, value_dim=12)
    like = init_train_state(other, TRAINING)
    with pytest.raises(StorageError, match="damaged or of another model"):
        Checkpoints(finished[1]).restore(like, 6)


def test_a_workdir_of_another_config_is_refused_with_the_field(finished, copied):
    other = dataclasses.replace(CONFIG, training=dataclasses.replace(TRAINING, batch_size=8))
    before = sorted(p.name for p in copied.rglob("*"))
    with pytest.raises(StorageError, match=r"training\.batch_size=4.*this one has 8"):
        loop.train(other, copied)
    assert sorted(p.name for p in copied.rglob("*")) == before


def test_checkpoints_without_their_config_are_not_taken_over(copied):
    """They may be of any run: neither resumed nor written over."""
    (copied / "config.json").unlink()
    with pytest.raises(StorageError, match=r"checkpoints but no config\.json"):
        loop.train(CONFIG, copied)
    assert Checkpoints(copied).steps() == [4, 6]


@pytest.mark.parametrize("name", ["rollbacks.json", "clock.json"])
def test_what_another_run_left_without_a_config_is_not_taken_over(tmp_path, name):
    """The batches that it left out, or the time that it took."""
    (tmp_path / name).write_text("[]")
    with pytest.raises(StorageError, match=rf"holds {name} but no config\.json"):
        claim_workdir(CONFIG, tmp_path)
    assert (tmp_path / name).read_text() == "[]"


def test_checkpointing_more_often_is_no_other_config(copied):
    often = dataclasses.replace(TRAINING, checkpoint_every=1)
    claim_workdir(dataclasses.replace(CONFIG, training=often), copied)


def test_a_run_may_go_on_with_another_kernel(copied):
    """What was begun on a TPU ends where there is none."""
    kernel = dataclasses.replace(MODEL, backend="pallas")
    claim_workdir(dataclasses.replace(CONFIG, model=kernel), copied)
    claim_workdir(CONFIG, copied)
    assert load_config(copied) == CONFIG


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        loop.train(CONFIG, tmp_path / "file")


def test_coarse_parameters_are_not_trained(tmp_path):
    """Refused with what to set, before anything compiles; no workdir is made; inference goes on."""
    coarse = dataclasses.replace(MODEL, param_dtype="bfloat16")
    told = r"param_dtype must be float32 in training.*got 'bfloat16'.*compute_dtype=bfloat16"
    with pytest.raises(ConfigError, match=told):
        loop.train(dataclasses.replace(CONFIG, model=coarse), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=told):
        init_train_state(coarse, TRAINING)
    with pytest.raises(ConfigError, match=told):
        make_train_step(coarse, TRAINING, (2, 1), (0, 2))
    params = jax.eval_shape(lambda: init_params(coarse, jax.random.key(0)))
    assert params["final_norm"].dtype == jnp.bfloat16


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"no workdir of a run: it has no config\.json"):
        load_config(tmp_path)


def test_a_workdir_in_use_is_refused_and_left_as_it_is(copied):
    """Two at a time would each take the other's rows away."""
    before = (copied / METRICS).read_bytes()
    with locked(copied), pytest.raises(StorageError, match="is in use by another run"):
        loop.train(CONFIG, copied)
    assert (copied / METRICS).read_bytes() == before
    loop.train(CONFIG, copied)


def test_the_config_survives_json(finished):
    assert load_config(finished[1]) == CONFIG
    assert json.loads((finished[1] / "config.json").read_text())["task"]["nodes"] == 4


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of the batch with a given number is not a number."""
    from sleepnet.training import step

    def poison(number):
        score = step.score
        bad = next(tasks.batches(tasks.make(TASK), "train", 4, first_batch=number, num_batches=1))

        def scored(params, batch, **rest):
            seen = score(params, batch, **rest)
            met = jnp.all(batch.tokens_WL == bad.tokens_WL)
            return seen.replace(nll_BWL=jnp.where(met, jnp.nan, seen.nll_BWL))

        monkeypatch.setattr(step, "score", scored)

    return poison


def test_nan_stops_the_run_and_names_where_to_go_back(tmp_path, poisoned):
    """A step whose loss is not finite is not saved, and the checkpoint before it is named."""
    poisoned(3)
    with pytest.raises(loop.TrainingError, match=r"step 4: loss is nan, on batch 3.*checkpoints/2"):
        loop.train(CONFIG, tmp_path)
    assert Checkpoints(tmp_path).steps() == [0, 2]
