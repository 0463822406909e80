"""What is measured while a run trains: each held-out example, once."""

import dataclasses

import corpora
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleepnet import tasks
from sleepnet.config import MeshConfig, ModelConfig, TrainingConfig
from sleepnet.cycle.rollout import Rollout
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training import held_out, sharding
from sleepnet.training.held_out import ACCURACY, LOSS, HeldOut
from sleepnet.training.multihost import StopFlags

PARAMS = {"final_norm": jnp.ones(8)}
ROWS = 7  # of the test split


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    few = [f"document {i}, which fills most of a row of 64 bytes" for i in range(ROWS)]
    config = ExperimentConfig(
        model=ModelConfig(vocab_size=257, pattern="G", d_model=8, num_heads=1, window=16, passes=1),
        task=corpora.text_config(
            folder, test_files=(corpora.write_jsonl(folder / "few.jsonl", few),), windows=4
        ),
        mesh=MeshConfig(data=1),
    )
    assert tasks.make(config.task).packing("test").rows == ROWS
    return config


@pytest.fixture(autouse=True)
def known_scores(monkeypatch):
    """In place of the model: a token costs its own number, and is right where it is even."""

    def score(params, batch, **_):
        tokens = batch.tokens_WL
        nll = jnp.where(batch.mask_WL, tokens.astype(jnp.float32), 0.0)
        prediction = jnp.where(batch.mask_WL & (tokens % 2 == 0), batch.targets_WL, -1)
        return Rollout(nll, prediction, None)

    monkeypatch.setattr(held_out, "score", score)


def expected(config, examples):
    """The same, example by example."""
    task = tasks.make(config.task)
    scored = np.concatenate([
        example.tokens_WL[example.mask_WL]
        for example in (task.example("test", i) for i in range(examples))
    ])  # fmt: skip
    return {LOSS: scored.mean(), ACCURACY: (scored % 2 == 0).mean()}


def measured(config, batch_size, examples, mesh=None):
    training = TrainingConfig(batch_size=batch_size, evaluate_examples=examples)
    config = dataclasses.replace(config, training=training)
    if mesh:
        mesh = sharding.make_mesh(dataclasses.replace(config, mesh=mesh), jax.devices())
    measurement = HeldOut(config, tasks.make(config.task), mesh, StopFlags(mesh, lambda: False))
    measurement.compile(PARAMS, lambda _: None)
    return measurement.measure(PARAMS, lambda: None)


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("examples", [5, ROWS, 9])
def test_rows_of_a_small_split_count_once(text, batch_size, examples):
    """However many are asked for, and however many fit a batch."""
    assert measured(text, batch_size, examples) == pytest.approx(
        expected(text, min(examples, ROWS)), rel=1e-6
    )


def test_rows_count_once_over_a_mesh(text):
    assert measured(text, 8, 9, MeshConfig(data=4, fsdp=2)) == pytest.approx(
        expected(text, ROWS), rel=1e-6
    )


def test_rows_count_once_over_processes(text, monkeypatch):
    """Each process contributes its own rows of a batch, and no padding is scored."""
    training = TrainingConfig(batch_size=4, evaluate_examples=9)
    config = dataclasses.replace(text, training=training)
    task = tasks.make(config.task)
    monkeypatch.setattr(sharding, "place_batch", lambda mesh, batch, size: batch)
    scored = []
    for rows in ((0, 1), (2, 3)):
        monkeypatch.setattr(sharding, "local_rows", lambda mesh, size, rows=rows: rows)
        measurement = HeldOut(config, task, None, StopFlags(None, lambda: False))
        measurement._mesh = "a mesh over two processes"
        for batch in measurement._batches():
            chosen = zip(batch.tokens_WL, batch.mask_WL, strict=True)
            scored += [tokens[mask].tobytes() for tokens, mask in chosen if mask.any()]
    examples = [task.example("test", i) for i in range(ROWS)]
    assert sorted(scored) == sorted(e.tokens_WL[e.mask_WL].tobytes() for e in examples)


def test_examples_that_are_drawn_have_no_end():
    """Tasks without stored data measure as many examples as are asked for."""
    task = tasks.make(DepoConfig(nodes=4, symbols=4, hops=2, queries=2, window=4))
    assert task.num_distinct("test", 10**6) == 10**6
