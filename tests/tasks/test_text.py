"""Text as a task: what an example holds, against documents read by hand."""

import dataclasses
import functools
import itertools

import corpora
import jax
import numpy as np
import pytest

import sleepnet
from sleepnet import tasks
from sleepnet.config import ConfigError, ModelConfig
from sleepnet.training.step import score


@pytest.fixture
def task(text):
    return tasks.make(text)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_pieces_of_an_epoch_are_the_documents(task, split, epoch):
    """Every byte once as a token; every target the next byte of its document, or its end."""
    rows = task.packing(split).rows
    examples = [task.example(split, epoch * rows + i) for i in range(rows)]
    found = [piece for example in examples for piece in corpora.read_back(example)]
    documents = [text.encode() for text in corpora.TEXTS[split]]
    assert sorted(found) == sorted(corpora.cut(documents, end=256, size=64))


def test_every_valid_place_is_scored_and_its_depth_counts_the_windows_of_its_document(task):
    for index in range(task.packing("train").rows):
        example = task.example("train", index)
        valid_WL = np.arange(task.window) < example.length_W[:, None]
        np.testing.assert_array_equal(example.mask_WL, valid_WL)
        depth = 0
        for w, reset in enumerate(example.reset_W):
            depth = 1 if reset else depth + 1
            assert (example.depth_WL[w][valid_WL[w]] == depth).all()


def test_all_windows_sleep_but_the_last(task):
    assert task.window_passes(3) == (3, 3, 3, 1)


def test_depths_are_those_that_the_test_split_has(task):
    rows = range(task.packing("test").rows)
    asked = {int(d) for i in rows for d in np.unique(task.example("test", i).depth_WL)} - {0}
    assert asked == set(task.depths)


def test_another_seed_is_another_order_of_the_same_text(task, text):
    other = tasks.make(dataclasses.replace(text, seed=1))
    one, two = (
        [corpora.read_back(made.example("train", i)) for i in range(task.packing("train").rows)]
        for made in (task, other)
    )
    assert one != two
    assert sorted(itertools.chain(*one)) == sorted(itertools.chain(*two))


def test_predictions_per_byte_are_counted(task):
    assert task.predicted_per_byte("test") == 1.0


@pytest.mark.parametrize("eviction", ["hard", pytest.param("sliding", marks=pytest.mark.slow)])
def test_a_neighbour_never_changes_a_documents_loss(task, eviction):
    """Bit for bit when the neighbour is other text; and it is the loss of the document alone."""
    model = ModelConfig(
        vocab_size=257, pattern="GA", d_model=8, num_heads=1, window=16, passes=2,
        eviction=eviction, conv_carry=True,
    )  # fmt: skip
    params = jax.jit(sleepnet.init_params, static_argnums=0)(model, jax.random.key(0))
    examples = (task.example("train", i) for i in range(99))
    example = next(e for e in examples if e.reset_W[2] and (e.length_W > 0).all())

    def nll_WL(example):
        batch = tasks.Example(*(x[None] for x in example))
        return np.asarray(compiled(params, batch).nll_BWL[0])

    compiled = jax.jit(
        functools.partial(
            score, model=model, window_passes=(2, 2, 2, 2), scored_per_window=(16, 16, 16, 16)
        )
    )
    packed = nll_WL(example)
    others_WL = example.tokens_WL.copy()
    others_WL[:2] = (others_WL[:2] + 7) % 256
    changed = nll_WL(example._replace(tokens_WL=others_WL))
    assert not np.array_equal(changed[:2], packed[:2])
    np.testing.assert_array_equal(changed[2:], packed[2:])

    def moved_to_the_front(array_W):
        return np.concatenate([array_W[2:], np.zeros_like(array_W[:2])])

    alone = nll_WL(tasks.Example(*map(moved_to_the_front, example)))
    np.testing.assert_allclose(alone[:2], packed[2:], rtol=0, atol=1e-5 * alone.max())


def test_a_run_knows_its_text_again(text, tmp_path):
    config = corpora.text_config(tmp_path)
    known = tasks.make(config).config
    assert tasks.make(known).config == known
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"it had .*test\.jsonl: \d+ bytes, sha256 .*there is"):
        tasks.make(known)
