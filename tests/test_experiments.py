"""Every experiment file builds a valid config, documents itself, and its training step traces."""

import importlib
import pathlib

import corpora
import jax
import pytest

from launch.common import cli
from sleepnet import tasks
from sleepnet.training.step import init_train_state, make_train_step

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if "def get_config" in p.read_text())


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
        yield


@pytest.fixture(autouse=True)
def text_in_place_of_the_corpus(tmp_path, monkeypatch):
    """What text_small reads, where it looks for it: a few words."""
    corpora.text_config(tmp_path / "runs" / "stdlib")
    monkeypatch.chdir(tmp_path)


def load(name):
    module = importlib.import_module(f"experiments.{name}")
    return module, cli.experiment_config(module.get_config())


def test_the_experiments_are_there():
    assert {"depo_small", "rule110_small", "text_small", "depo", "rule110"} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_has_the_command(name):
    module, _ = load(name)
    assert f"python -m launch.train --config=experiments/{name}.py --workdir=" in module.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_one_training_step_lowers_at_full_size(name):
    """Nothing is allocated: state and batch are abstract; the task's real shapes are used."""
    _, config = load(name)
    task = tasks.make(config.task)
    step = make_train_step(
        config.model,
        config.training,
        task.window_passes(config.model.passes),
        task.scored_per_window,
    )
    state = jax.eval_shape(lambda: init_train_state(config.model, config.training))
    example = task.example("train", 0)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.training.batch_size, *x.shape), x.dtype), example
    )
    _, metrics = step.lower(state, batch).out_info
    assert {key: value.shape for key, value in metrics.items()} == dict.fromkeys(
        ("loss", "accuracy", "grad_norm", "bad", "bad_so_far", "bad_in_a_row"), ()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depo", "rule110"])
def test_the_papers_sizes_take_steps_here(name, tmp_path):
    """Two real steps at full model size on a small batch: finite, and the parameters move."""
    from sleepnet.training import loop

    module = importlib.import_module(f"experiments.{name}")
    values = module.get_config()
    values.training.update(steps=2, batch_size=2, warmup_steps=1, log_every=1)
    rows = []
    loop.train(cli.experiment_config(values), tmp_path, on_progress=rows.append)
    assert [row.step for row in rows] == [1, 2]
