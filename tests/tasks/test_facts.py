"""The labels, depths, splits and floor of facts, against a reader of nothing but the stream."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepnet.config import ConfigError
from sleepnet.tasks import Facts, FactsConfig
from sleepnet.tasks.facts import facts_identity
from sleepnet.tasks.splits import split_of

SMALL = FactsConfig(depths=(1, 3, 6), keys=9, values=5, noise=3, window=9, facts=4, queries=3)


def stream_of(example) -> list[int]:
    """All valid tokens, one after the other."""
    rows = zip(example.tokens_WL.tolist(), example.length_W.tolist(), strict=True)
    return [token for row, length in rows for token in row[:length]]


def told(config: FactsConfig, stream) -> dict[int, tuple[int, int]]:
    """Key -> the token of its value and its page, from the start: a key with a value behind it."""
    found = {}
    for place, (key, value) in enumerate(itertools.pairwise(stream)):
        if key < config.keys and config.keys <= value < config.keys + config.values:
            assert key not in found, "a key has two values"
            found[key] = value, place // config.page
    return found


def check(config: FactsConfig, split: str, index: int):
    example = Facts(config).example(split, index)
    stream = stream_of(example)
    facts = told(config, stream)
    pages = config.depths[-1]
    assert len(facts) == config.facts
    assert len(stream) == pages * config.page + 2 * config.queries
    questions = stream[pages * config.page :]
    keys, marks = questions[::2], questions[1::2]
    assert set(marks) == {config.keys + config.values + config.noise}
    assert len(set(keys)) == config.queries
    expected = [(facts[key][0], pages - facts[key][1], n) for n, key in enumerate(keys)]
    scored = example.mask_WL
    labels = (example.targets_WL, example.depth_WL, example.answer_WL)
    assert list(zip(*(label[scored].tolist() for label in labels), strict=True)) == expected
    assert example.tokens_WL[scored].tolist() == marks
    assert {depth for _, depth, _ in expected} <= set(config.depths)
    others = Counter(stream[: pages * config.page]) - Counter(
        token for key, (value, _) in facts.items() for token in (key, value)
    )
    assert all(config.keys + config.values <= token < marks[0] for token in others)


@st.composite
def configs(draw):
    page = draw(st.integers(2, 12))
    depths = tuple(sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4))))
    keys = draw(st.integers(3, 20))
    facts = draw(st.integers(1, min(keys, page // 2)))
    return FactsConfig(
        facts=facts,
        keys=keys,
        values=draw(st.integers(3, 20)),
        noise=draw(st.integers(1, 20)),
        depths=depths,
        queries=draw(st.integers(1, facts)),
        page=page,
        window=page * draw(st.integers(1, depths[-1] + 1)),
        test_fraction=0.3,
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=100, deadline=None)
@given(config=configs(), split=st.sampled_from(("train", "test")), index=st.integers(0, 2**40))
def test_every_answer_is_the_value_that_stood_behind_the_key(config, split, index):
    """And its depth the pages between; there is nothing else in the stream but distractors."""
    check(config, split, index)


@settings(max_examples=50, deadline=None)
@given(config=configs(), index=st.integers(0, 100))
def test_the_same_tokens_are_read_whatever_the_window(config, index):
    """Models that sleep every page and models that keep the whole stream learn from equal data."""
    by_page = Facts(dataclasses.replace(config, window=config.page)).example("train", index)
    other = Facts(config).example("train", index)
    assert stream_of(other) == stream_of(by_page)
    for name in ("targets_WL", "depth_WL", "answer_WL"):
        scored = [getattr(example, name)[example.mask_WL] for example in (by_page, other)]
        np.testing.assert_array_equal(*scored)
    assert (other.length_W[1:-1] == config.window).all()


def test_with_a_window_per_page_the_model_sleeps_as_often_as_the_depth_says():
    task = Facts(SMALL)
    assert task.window_passes(4) == (4,) * 6 + (1,)
    assert task.scored_per_window == (0,) * 6 + (3,)


def test_with_one_window_for_all_the_model_never_sleeps():
    task = Facts(dataclasses.replace(SMALL, window=SMALL.tokens, page=SMALL.page))
    assert (task.window_passes(4), task.scored_per_window) == ((1,), (3,))


def test_train_and_test_never_share_a_set_of_facts():
    """Small enough that both splits are seen whole: 3 keys taken 2 at a time, 3 values each."""
    config = FactsConfig(depths=(1, 2), keys=3, values=3, facts=2, window=4, test_fraction=0.3)
    everything = {
        frozenset(zip(keys, values, strict=True))
        for keys in itertools.combinations(range(3), 2)
        for values in itertools.product(range(3), repeat=2)
    }
    expected = {split: set() for split in ("train", "test")}
    for facts in everything:
        expected[split_of(facts_identity(list(facts)), 0.3)].add(facts)
    assert min(map(len, expected.values())) > 3
    for seed in (0, 1):
        task = Facts(dataclasses.replace(config, seed=seed))
        for split, sets in expected.items():
            seen = set()
            for index in range(300):
                facts = told(config, stream_of(task.example(split, index)))
                seen.add(frozenset((key, value - 3) for key, (value, _) in facts.items()))
            assert seen == sets


@given(st.permutations([(0, 3), (1, 3), (2, 0)]))
def test_the_identity_of_facts_is_that_of_any_order(facts):
    assert facts_identity(facts) == facts_identity([(0, 3), (1, 3), (2, 0)])
    assert facts_identity([(0, 3), (1, 0), (2, 3)]) != facts_identity(facts)


def test_depths_open_one_by_one_and_only_in_training():
    task = Facts(dataclasses.replace(SMALL, curriculum=300))
    deepest = np.array([task.example("train", i).depth_WL.max() for i in range(400)])
    bound = np.array(SMALL.depths)[np.minimum(2, np.arange(400) // 100)]
    assert (deepest <= bound).all()
    assert set(deepest[:100]) == {1}
    assert deepest[100:200].max() == 3
    assert max(task.example("test", i).depth_WL.max() for i in range(20)) == 6


def test_depths_are_uniform_and_keys_and_values_too():
    task = Facts(SMALL)
    examples = [task.example("test", i) for i in range(800)]
    depths = Counter(d for e in examples for d in e.depth_WL[e.mask_WL].tolist())
    values = Counter(v for e in examples for v in e.targets_WL[e.mask_WL].tolist())
    keys = Counter(k for e in examples for k in told(SMALL, stream_of(e)))
    for drawn, kinds in ((depths, 3), (values, SMALL.values), (keys, SMALL.keys)):
        count, p = sum(drawn.values()), 1 / kinds
        assert len(drawn) == kinds
        for times in drawn.values():
            assert abs(times / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5


def test_the_floor_is_what_a_guess_scores():
    """By answer, and by example: all that ask this depth."""
    task, answers, exact = Facts(SMALL), [], []
    for index in range(2500):
        example = task.example("test", index)
        asked = example.depth_WL[example.mask_WL] == 3
        right = (example.targets_WL[example.mask_WL] == SMALL.keys + 2)[asked]
        answers += right.tolist()
        exact += [right.all()] * bool(len(right))
    for outcomes, floor in zip((answers, exact), task.floor(3), strict=True):
        error = (floor * (1 - floor) / len(outcomes)) ** 0.5
        assert abs(np.mean(outcomes) - floor) < 4 * error


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(facts=5), r"facts must lie in 1\.\.4; got 5"),
        (dict(page=5), "page must divide window=8; got 5; the nearest is 4"),
        (dict(window=80, page=8), "window must be at most 72"),
        (dict(depths=(2, 1)), "depths must rise from 1 or more"),
        (dict(queries=5), r"queries must lie in 1\.\.4; got 5"),
    ],
)
def test_what_cannot_be_is_answered_with_what_can(wrong, message):
    with pytest.raises(ConfigError, match=message):
        FactsConfig(**wrong)
