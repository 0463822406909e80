"""What a run does about bad steps, full disks and held-out examples. Steps here cost nothing: what
the loop does around them is looked at; real ones are in test_loop and, slow, in test_bad_steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleepnet import tasks
from sleepnet.config import MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.storage import StorageError
from sleepnet.tasks import DepoConfig
from sleepnet.training import guard, loop
from sleepnet.training import step as step_module
from sleepnet.training.checkpoint import Checkpoints
from sleepnet.training.metrics import METRICS, MetricsWriter, read_metrics, read_rows
from sleepnet.training.run_io import Rollback, Rollbacks
from sleepnet.training.step import TrainState

TASK = DepoConfig(nodes=4, symbols=4, hops=2, queries=2, window=4, test_fraction=0.5)
MODEL = ModelConfig(vocab_size=6, pattern="G", d_model=8, num_heads=1, window=4, passes=2)
TRAINING = TrainingConfig(
    steps=12, batch_size=2, log_every=1, checkpoint_every=2, checkpoints_kept=9, rollback_steps=2
)
CONFIG = ExperimentConfig(model=MODEL, task=TASK, training=TRAINING, mesh=MeshConfig(data=1))


def config(**training):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(TRAINING, **training))


def batch_of(number):
    return next(tasks.batches(tasks.make(TASK), "train", 2, first_batch=number, num_batches=1))


@pytest.fixture
def cheap(monkeypatch):
    """Steps whose loss says which batch they took, by its number, and is NaN on some of them."""

    def use(bad=()):
        seen_BWL = jnp.stack([batch_of(number).tokens_WL for number in range(40)])

        def make(model, training, *_, **__):
            def step(state, batch):
                same = jnp.all(seen_BWL == batch.tokens_WL[None], axis=(1, 2, 3))
                number = jnp.argmax(same)
                wrong = jnp.any(number == jnp.array([*bad, -1]))
                loss = jnp.where(wrong, jnp.nan, number.astype(jnp.float32))
                is_bad, recent = guard.judge(state.recent, loss, 1.0, training.spike_factor)
                metrics = {
                    "loss": loss, "accuracy": loss, "grad_norm": jnp.float32(1),
                    "bad": is_bad.astype(jnp.int32), "bad_so_far": recent.bad,
                    "bad_in_a_row": recent.bad_in_a_row,
                }  # fmt: skip
                return TrainState(state.step + 1, state.params, state.opt_state, recent), metrics

            return step

        monkeypatch.setattr(loop, "make_train_step", make)
        monkeypatch.setattr(step_module, "init_train_state", few_parameters)

    return use


def few_parameters(model, training):
    return TrainState(jnp.int32(0), {"final_norm": jnp.ones(8)}, (), guard.no_steps(training))


def test_a_rollback_goes_back_and_meets_none_of_the_batches_again(cheap, tmp_path):
    """Batch 5 is bad at step 6: back to step 4, and on with batch 6."""
    cheap(bad=[5])
    notices = []
    loop.train(config(on_bad_step="rollback"), tmp_path, on_notice=notices.append)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == [0, 1, 2, 3, *range(6, 14)]
    assert [row["rollbacks"] for row in rows] == [0] * 4 + [1] * 8
    assert any("loss is nan, on batch 5; going back to step 4" in notice for notice in notices)
    (back,) = Rollbacks(tmp_path).all
    assert (back.bad_step, back.to, back.batch) == (6, 4, 5)


def test_a_rollback_behind_an_earlier_one_meets_none_of_its_batches(tmp_path):
    """Bad steps 15 and then 12 went back to 10 and 5: their batches 14 and 16 are left out."""
    rollbacks = Rollbacks(tmp_path)
    for bad_step, to in ((15, 10), (12, 5)):
        batch = rollbacks.batch_of(bad_step)
        rollbacks.add(Rollback(bad_step, to, batch, loss=1.0, grad_norm=1.0))
    taken = [Rollbacks(tmp_path).batch_of(step) for step in range(1, 16)]
    assert taken == [0, 1, 2, 3, 4, *range(17, 27)]
    spans = Rollbacks(tmp_path).spans(0, 15)
    assert [first + i for first, count in spans for i in range(count)] == taken


def test_stopped_anywhere_around_two_rollbacks_it_ends_alike(cheap, tmp_path):
    """Rows and rollbacks are those of the run that was not stopped."""
    cheap(bad=[5, 9])
    changed = config(on_bad_step="rollback")
    whole = tmp_path / "whole"
    loop.train(changed, whole)
    for number, moment in enumerate([("data", 5), ("step", 6), ("restore", 6), ("save", 8)]):
        stopped, asked = tmp_path / str(number), []

        def enter(*where, moment=moment, asked=asked):
            asked += [True] * (where == moment)

        loop.train(changed, stopped, on_phase=enter, should_stop=lambda asked=asked: bool(asked))
        loop.train(changed, stopped)
        for name in (METRICS, "rollbacks.json"):
            assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_after_so_many_rollbacks_the_run_stops(cheap, tmp_path):
    cheap(bad=[5, 8, 9])
    with pytest.raises(loop.TrainingError, match=r"on batch 9 \(after training.rollbacks=2\)"):
        loop.train(config(on_bad_step="rollback", rollbacks=2), tmp_path)


def test_skipped_steps_are_counted_and_only_so_many_in_a_row(cheap, tmp_path):
    cheap(bad=[2, 3, 6])
    notices = []
    loop.train(config(on_bad_step="skip", skips_in_a_row=2), tmp_path, on_notice=notices.append)
    counts = [row["skipped"] for row in read_metrics(tmp_path)]
    assert counts == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert sum("its update is left out" in notice for notice in notices) == 3
    with pytest.raises(loop.TrainingError, match=r"step 4.*skips_in_a_row=1"):
        loop.train(config(on_bad_step="skip", skips_in_a_row=1), tmp_path / "other")


def test_a_spike_is_judged_by_the_median_of_good_steps():
    """Known only once there are enough; a spike itself does not raise the median. Under
    JAX_DEBUG_INFS=1 too."""
    verdicts, judge = [], jax.jit(guard.judge, static_argnums=3)
    steps = [(50, 1), (1, 1), (2, 1), (9, 1), (7, 1), (2, 1), (7, 1), (1, 5), (1, 1)]
    with jax.debug_infs(True):
        recent = guard.no_steps(dataclasses.replace(TRAINING, spike_window=3))
        for loss, norm in steps:
            bad, recent = judge(recent, jnp.float32(loss), jnp.float32(norm), 4.0)
            verdicts.append(bool(bad))
    #  medians of loss: none, none, none, 2 (50 1 2), 2, 2, 2 (1 2 2) ...
    assert verdicts == [False, False, False, True, False, False, False, True, False]


def test_a_full_disk_is_told_at_once_and_by_policy_the_run_goes_on(cheap, tmp_path, monkeypatch):
    """No row is lost when there is room again, and the checkpoints that follow are whole."""
    cheap()
    full = []
    flush = MetricsWriter.sync

    def sync(self):
        if full:
            raise StorageError("cannot write metrics: No space left on device")
        flush(self)

    def enter(phase, step):
        full[:] = [True] if 3 <= step <= 7 else []

    monkeypatch.setattr(MetricsWriter, "sync", sync)
    with pytest.raises(StorageError, match="No space left on device"):
        loop.train(config(), tmp_path / "stops", on_phase=enter)
    full.clear()
    notices = []
    loop.train(
        config(on_save_error="continue"), tmp_path / "goes on", on_phase=enter,
        on_notice=notices.append,
    )  # fmt: skip
    assert sum("No space left on device; the run goes on" in notice for notice in notices) == 2
    assert Checkpoints(tmp_path / "goes on").steps() == [0, 2, 8, 10, 12]
    assert [row["step"] for row in read_metrics(tmp_path / "goes on")] == list(range(1, 13))


def test_a_row_that_the_disk_refuses_is_written_when_it_can_be(tmp_path, monkeypatch):
    """By halves never: what a full disk took of a row is taken back."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0}, {})
    whole, rows = (tmp_path / METRICS).read_bytes(), writer._metrics
    true = rows._file

    class Full:
        def write(self, data):
            if true.write(data[:5]):
                raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(true, name)

    monkeypatch.setattr(rows, "_file", Full())
    with pytest.raises(StorageError, match=r"metrics\.jsonl: No space left on device"):
        writer.write(2, {"loss": 2.0}, {})
    assert (tmp_path / METRICS).read_bytes() == whole
    monkeypatch.setattr(rows, "_file", true)
    writer.write(3, {"loss": 3.0}, {})
    writer.close()
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2, 3]


def test_the_step_compiles_once_and_another_time_is_told():
    from sleepnet.training.program import Program

    notices = []
    program = Program("step", jax.jit(lambda x: x + 1), (np.ones(3, np.float32),), notices.append)
    program(np.zeros(3, np.float32))
    assert len(notices) == 1 and "the step compiled in" in notices[0]
    assert program(np.zeros(4, np.float32)).shape == (4,)
    assert "the step is compiled AGAIN" in notices[1] and "float32[4]" in notices[1]


def test_over_a_mesh_the_rows_are_those_of_one_device_and_parameters_are_split(cheap, tmp_path):
    """Also when one goes on where the other stopped: the mesh of a run is free to change."""
    cheap()
    one, two = config(), dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=2))
    loop.train(one, tmp_path / "one")
    state = loop.train(two, tmp_path / "two")
    parts = [part.data.shape for part in state.params["final_norm"].addressable_shards]
    assert parts == [(4,), (4,)]
    asked = []
    loop.train(
        two, tmp_path / "both", should_stop=lambda: bool(asked),
        on_phase=lambda *where: asked.extend([True] * (where == ("step", 7))),
    )  # fmt: skip
    loop.train(one, tmp_path / "both")
    for name in ("two", "both"):
        assert (tmp_path / name / METRICS).read_bytes() == (tmp_path / "one" / METRICS).read_bytes()


@pytest.mark.slow
def test_a_profile_of_some_steps_lies_in_the_workdir(cheap, tmp_path):
    cheap()
    loop.train(config(), tmp_path, profile_steps=(3, 5))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
