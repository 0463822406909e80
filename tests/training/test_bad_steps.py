"""Real steps that go wrong, and real steps over a mesh; each end compared with steps by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import GRADIENTS, assert_agree

from sleepnet import tasks
from sleepnet.config import MeshConfig, ModelConfig, TrainingConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training import guard, loop, step
from sleepnet.training.metrics import read_metrics
from sleepnet.training.optimizer import at_step, optimizer, schedule
from sleepnet.training.step import TrainState, make_init

TASK = DepoConfig(nodes=4, symbols=4, hops=2, queries=2, window=4, test_fraction=0.5)
MODEL = ModelConfig(vocab_size=6, pattern="G", d_model=8, num_heads=1, window=4, passes=2)
TRAINING = TrainingConfig(
    steps=6, batch_size=8, log_every=1, checkpoint_every=2, rollback_steps=1, warmup_steps=0
)
CONFIG = ExperimentConfig(model=MODEL, task=TASK, training=TRAINING, mesh=MeshConfig(data=1))


def config(mesh=None, **training):
    return dataclasses.replace(
        CONFIG,
        training=dataclasses.replace(TRAINING, **training),
        mesh=MeshConfig(**(mesh or dict(data=1))),
    )


def by_hand(batches):
    """The state after steps on the batches with these numbers, without the loop."""
    task = tasks.make(TASK)
    train_step = step.make_train_step(
        MODEL, TRAINING, task.window_passes(MODEL.passes), task.scored_per_window
    )
    state = step.init_train_state(MODEL, TRAINING)
    for number in batches:
        (batch,) = tasks.batches(task, "train", 8, first_batch=number, num_batches=1)
        state, _ = train_step(state, batch)
    return state


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of batch 3 is not a number."""
    score = step.score
    (bad,) = tasks.batches(tasks.make(TASK), "train", 8, first_batch=3, num_batches=1)

    def scored(params, batch, **rest):
        seen = score(params, batch, **rest)
        met = jnp.all(batch.tokens_WL == bad.tokens_WL)
        return seen.replace(nll_BWL=jnp.where(met, jnp.nan, seen.nll_BWL))

    monkeypatch.setattr(step, "score", scored)


@pytest.mark.slow
def test_a_skipped_step_leaves_no_trace_in_the_parameters(poisoned, tmp_path):
    """They are those of steps on the other batches, and so is what the optimizer keeps."""
    state = loop.train(config(on_bad_step="skip"), tmp_path)
    assert int(state.step) == 6
    expected = by_hand([0, 1, 2, 4, 5])
    assert_agree(state.params, expected.params, tol=1e-5)
    kept = at_step(expected.opt_state, jnp.int32(6))  # but for the step, which the schedule follows
    assert_agree(state.opt_state, kept, tol=1e-5)


@pytest.mark.parametrize("skipped", [(), (3, 4, 8), (10,)])
def test_with_skipped_steps_a_run_still_ends_at_its_last_rate(monkeypatch, skipped):
    """Each update takes the rate of its step; momentum and its bias correction know only the
    updates that were made."""
    training = dataclasses.replace(
        TRAINING, steps=10, warmup_steps=2, decay_fraction=0.5, on_bad_step="skip",
        adam_learning_rate=0.1, adam_weight_decay=0.1, clip_norm=1e9,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    grads = [{"head": jnp.asarray(rng.normal(size=8), jnp.float32)} for _ in range(10)]
    losses = [jnp.float32(np.nan if t in skipped else 1.0) for t in range(1, 11)]

    def gradient(params, batch):
        loss, grads = batch
        return (loss, loss), grads

    monkeypatch.setattr(step, "_gradient_of_batch", lambda *_, **__: gradient)
    params = {"head": jnp.ones(8)}
    adam = optax.scale_by_adam(b2=training.adam_b2, nesterov=True)
    rate = schedule(training, training.adam_learning_rate)
    expected, moments = params, adam.init(params)
    state = TrainState(
        jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer(training).init(params),
        guard.no_steps(training),
    )  # fmt: skip
    train_step = step.make_train_step(MODEL, training, (1,), (1,))
    for t, (loss, grad) in enumerate(zip(losses, grads, strict=True), start=1):
        state, metrics = train_step(state, (loss, grad))
        assert metrics["bad"] == (t in skipped)
        if t not in skipped:
            update, moments = adam.update(grad, moments)
            expected = jax.tree.map(
                lambda p, u, t=t: p - rate(t - 1) * (u + 0.1 * p), expected, update
            )
        assert_agree(state.params, expected, tol=1e-5)
    assert int(state.step) == 10


@pytest.mark.slow
def test_after_a_rollback_the_parameters_are_those_of_the_other_batches(poisoned, tmp_path):
    """Batch 3 is met at step 4: back to step 2, and on with batch 4."""
    state = loop.train(config(on_bad_step="rollback"), tmp_path)
    expected = by_hand([0, 1, 4, 5, 6, 7])
    assert_agree(state.params, expected.params, tol=1e-5)
    assert_agree(state.opt_state, expected.opt_state, tol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(tmp_path):
    """From one device to four by two and back; the losses stay those of one device."""
    alone = loop.train(config(evaluate_every=3), tmp_path / "alone")
    legs = [(dict(data=1), 2), (dict(data=4, fsdp=2), 4), (dict(data=1), 6)]
    for mesh, end in legs:
        asked = []

        def enter(*where, end=end, asked=asked):
            asked += [True] * (where == ("step", end) and end < 6)  # the last leg is not stopped

        state = loop.train(
            config(mesh, evaluate_every=3), tmp_path / "moved",
            on_phase=enter, should_stop=lambda asked=asked: bool(asked),
        )  # fmt: skip
        assert int(state.step) == end
    assert_agree(state.params, alone.params, tol=GRADIENTS)
    rows, expected = (read_metrics(tmp_path / name) for name in ("moved", "alone"))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose([*row.values()], [*other.values()], rtol=GRADIENTS)


@pytest.mark.slow
def test_over_a_mesh_no_device_ever_holds_a_whole_matrix(tmp_path):
    """Neither of the fresh state nor of one that was restored."""
    sharded = config(dict(data=1, fsdp=8), steps=1, checkpoint_every=1)
    init = make_init(sharded, loop.make_mesh(sharded, jax.devices()))
    made, trained, restored = init(), loop.train(sharded, tmp_path), loop.train(sharded, tmp_path)
    for state in (made, trained, restored):
        matrices = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim == 3]
        assert matrices
        for x in matrices:
            shares = {shard.data.size for shard in x.addressable_shards}
            assert shares == {x.size // 8}
