"""What holds for every task, whatever its config."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepnet import tasks
from sleepnet.tasks import DepoConfig, FactsConfig, Rule110Config

CONFIGS = {
    "depo": DepoConfig(),
    "depo-sizes": DepoConfig(nodes=9, min_nodes=5, symbols=12, window=7, queries=5),
    "depo-words": DepoConfig(
        nodes=9, min_nodes=6, symbols=6, min_word=1, max_word=3, window=16, queries=6
    ),
    "depo-paper": DepoConfig(
        nodes=75, min_nodes=17, hops=16, symbols=50, max_word=2, queries=10, window=75
    ),
    "rule110": Rule110Config(),
    "rule110-steps": Rule110Config(
        cells=9, strings=3, steps=(1, 2, 5), cells_asked=4, questions=7, window=10
    ),
    "facts": FactsConfig(),
    "facts-whole": FactsConfig(depths=(1, 5), window=48, page=8, queries=3),
}
SPLITS = ("train", "test")

every_config = pytest.mark.parametrize("config", [*CONFIGS, "text"], indirect=True)
every_question = pytest.mark.parametrize("config", CONFIGS, indirect=True)
every_split = pytest.mark.parametrize("split", SPLITS)


@pytest.fixture
def config(request, text):
    """That of the task's name."""
    return CONFIGS.get(request.param, text)


def same(one: tasks.Example, other: tasks.Example) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@every_config
@every_split
def test_arrays_have_the_promised_shapes_and_dtypes(config, split):
    task = tasks.make(config)
    shape = (task.num_windows, config.window)
    example = task.example(split, 3)
    arrays = {name: a for name, a in example._asdict().items() if a is not None}
    resets = {"reset_W": (shape[:1], np.bool_)} if config.name == "text" else {}
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == resets | {
        "tokens_WL": (shape, np.int32),
        "length_W": (shape[:1], np.int32),
        "targets_WL": (shape, np.int32),
        "mask_WL": (shape, np.bool_),
        "depth_WL": (shape, np.int32),
        "answer_WL": (shape, np.int32),
    }


@every_config
@every_split
def test_valid_tokens_are_a_prefix_and_everything_else_is_empty(config, split):
    task = tasks.make(config)
    for index in range(100):
        example = task.example(split, index)
        valid_WL = np.arange(task.window) < example.length_W[:, None]
        assert not example.tokens_WL[~valid_WL].any()
        assert not example.mask_WL[~valid_WL].any()
        assert not example.targets_WL[~example.mask_WL].any()
        assert not example.depth_WL[~example.mask_WL].any()
        assert (example.answer_WL[~example.mask_WL] == -1).all()
        assert example.depth_WL[example.mask_WL].all()
        assert max(example.tokens_WL.max(), example.targets_WL.max()) < task.vocab_size


@every_question
@every_split
def test_context_windows_are_never_scored_and_the_bound_of_the_others_is_tight(config, split):
    task = tasks.make(config)
    scored_NW = np.array([task.example(split, i).mask_WL.sum(-1) for i in range(200)])
    assert (scored_NW <= task.scored_per_window).all()
    assert not scored_NW[:, : task.num_context_windows].any()
    assert task.scored_per_window[: task.num_context_windows] == (0,) * task.num_context_windows
    if config.name != "depo" or config.max_word == 1:
        assert (scored_NW.max(0) == task.scored_per_window).all()


@every_config
@every_split
def test_no_window_scores_more_than_its_bound(config, split):
    task = tasks.make(config)
    assert len(task.scored_per_window) == len(task.window_passes(3)) == task.num_windows
    for index in range(50):
        assert (task.example(split, index).mask_WL.sum(-1) <= task.scored_per_window).all()


@every_config
@every_split
def test_answers_are_numbered_in_order_without_gaps(config, split):
    task = tasks.make(config)
    for index in range(50):
        example = task.example(split, index)
        answers = example.answer_WL[example.mask_WL]
        assert (np.diff(answers, prepend=-1) >= 0).all()
        assert set(answers) == set(range(answers.max() + 1))


@every_question
def test_only_context_windows_are_passed_over_more_than_once(config):
    task = tasks.make(config)
    context, questions = task.num_context_windows, task.num_windows - task.num_context_windows
    assert task.window_passes(4) == (4,) * context + (1,) * questions


@every_config
@every_split
def test_an_example_does_not_depend_on_what_was_asked_before(config, split):
    forwards, backwards = tasks.make(config), tasks.make(config)
    expected = [forwards.example(split, i) for i in range(20)]
    for i in reversed(range(20)):
        assert same(backwards.example(split, i), expected[i])


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 2**40), split=st.sampled_from(SPLITS))
def test_any_index_can_be_asked_twice(index, split):
    task = tasks.make(DepoConfig())
    assert same(task.example(split, index), task.example(split, index))


@every_question
def test_examples_differ_between_indices_splits_and_seeds(config):
    task, other = tasks.make(config), tasks.make(dataclasses.replace(config, seed=config.seed + 1))
    examples = [task.example(split, i) for split in SPLITS for i in range(10)]
    examples += [other.example(split, i) for split in SPLITS for i in range(10)]
    assert len({example.tokens_WL.tobytes() for example in examples}) == len(examples)


@every_config
def test_an_unknown_split_and_a_negative_index_are_refused(config):
    task = tasks.make(config)
    with pytest.raises(ValueError, match=r"'valid'.*'train', 'test'"):
        task.example("valid", 0)
    with pytest.raises(ValueError, match="-3"):
        task.example("train", -3)


@every_config
def test_every_token_has_a_name_of_its_own(config):
    task = tasks.make(config)
    names = [task.token_name(token) for token in range(task.vocab_size)]
    assert len(set(names)) == task.vocab_size
    for outside in (-1, task.vocab_size):
        with pytest.raises(ValueError, match=str(outside)):
            task.token_name(outside)


@every_question
def test_the_floor_is_known_for_every_depth_that_test_asks_and_no_other(config):
    task = tasks.make(config)
    asked = {int(d) for i in range(200) for d in np.unique(task.example("test", i).depth_WL)} - {0}
    assert asked == set(task.depths)
    for depth in task.depths:
        floor = task.floor(depth)
        assert 0 < floor.answer < 1
        assert floor.exact is None or 0 < floor.exact <= floor.answer
    with pytest.raises(ValueError, match=f"999 {task.depth_name}"):
        task.floor(999)


def test_make_refuses_what_is_no_task():
    with pytest.raises(TypeError, match=r"dict.*DepoConfig, Rule110Config, FactsConfig"):
        tasks.make({})


def test_a_split_that_holds_nothing_is_reported():
    task = tasks.make(DepoConfig(nodes=3, symbols=3, queries=3, hops=2, test_fraction=1e-3))
    with pytest.raises(ValueError, match="the test split is empty"):
        task.example("test", 0)
