"""Rule 110's labels, splits and floor, against a solver that works on strings."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepnet.tasks import Rule110, Rule110Config
from sleepnet.tasks.automaton import evolve, evolve_packed, probability_of_one
from sleepnet.tasks.rule110 import state_identity
from sleepnet.tasks.splits import split_of

PAPER = Rule110Config()
LAPTOP = Rule110Config(
    cells=10, strings=3, steps=(1, 2, 4, 8), cells_asked=5, questions=6, window=12
)
TABLE = {"111": "0", "110": "1", "101": "1", "100": "0"}
TABLE |= {"011": "1", "010": "1", "001": "1", "000": "0"}


@functools.lru_cache(maxsize=4096)
def solve(state: str, steps: int) -> str:
    for _ in range(steps):
        ring = state[-1] + state + state[0]
        state = "".join([TABLE[ring[i : i + 3]] for i in range(len(state))])
    return state


def states_of(config: Rule110Config, example) -> list[str]:
    """The strings as the context windows tell them."""
    assert (example.length_W[: config.strings] == config.cells).all()
    rows = example.tokens_WL[: config.strings, : config.cells]
    return ["".join(map(str, row.tolist())) for row in rows]


def number(state: str) -> int:
    """The state as `evolve_packed` and `state_identity` write it: cell 0 is the lowest bit."""
    return int(state[::-1], 2)


def check_labels(config: Rule110Config, split: str, indices):
    task = Rule110(config)
    several = len(config.steps) > 1
    first_cell = 2 + (len(config.steps) if several else 0)
    for index in indices:
        example = task.example(split, index)
        states = states_of(config, example)
        labels = np.zeros((4, *example.tokens_WL.shape), np.int32)  # target, mask, depth, answer
        labels[3] = -1
        asked = []
        for w in range(config.strings, task.num_windows):
            step, window = config.steps[0], example.tokens_WL[w, : example.length_W[w]].tolist()
            for position, token in enumerate(window):
                if token < first_cell:
                    assert several and position % 2 == 0
                    step = config.steps[token - 2]
                    continue
                string, cell = divmod(token - first_cell, config.cells_asked)
                bit = solve(states[string], step)[cell]
                labels[:, w, position] = int(bit), True, step, len(asked)
                asked.append(token)
        expected = example.targets_WL, example.mask_WL, example.depth_WL, example.answer_WL
        np.testing.assert_array_equal(labels, expected, err_msg=f"{split} {index}")
        assert len(set(asked)) == len(asked) == config.questions
        assert len(set(example.depth_WL[example.mask_WL].tolist())) == 1
        if config.questions == config.strings * config.cells_asked:
            assert asked == sorted(asked)


@pytest.mark.parametrize(
    ("config", "split", "count"),
    [
        (LAPTOP, "train", 3500),
        (LAPTOP, "test", 3000),
        (PAPER, "train", 2000),
        (PAPER, "test", 1500),
    ],
    ids=["laptop-train", "laptop-test", "paper-train", "paper-test"],
)
def test_every_label_is_what_evolving_the_strings_gives(config, split, count):
    check_labels(config, split, range(count))


@st.composite
def configs(draw):
    cells = draw(st.integers(7, 62))
    strings, cells_asked = draw(st.integers(1, 5)), draw(st.integers(1, cells))
    return Rule110Config(
        cells=cells,
        strings=strings,
        steps=tuple(sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))),
        cells_asked=cells_asked,
        questions=draw(st.integers(1, strings * cells_asked)),
        window=draw(st.integers(cells, cells + 9)),
        curriculum=draw(st.sampled_from((0, 10))),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=40, deadline=None)
@given(config=configs(), split=st.sampled_from(("train", "test")))
def test_labels_hold_for_any_config(config, split):
    check_labels(config, split, range(3))


@settings(max_examples=100, deadline=None)
@given(state=st.text("01", min_size=3, max_size=62), steps=st.integers(0, 40))
def test_every_form_of_the_automaton_agrees_with_the_table(state, steps):
    expected = solve(state, steps)
    bits = np.array([int(bit) for bit in state])
    assert "".join(map(str, evolve(bits, steps))) == expected
    assert "".join(map(str, evolve(bits.astype(bool), steps).astype(int))) == expected
    np.testing.assert_array_equal(
        evolve(np.stack([bits, bits], axis=1), steps, axis=0)[:, 1], evolve(bits, steps)
    )
    assert evolve_packed(number(state), len(state), steps) == number(expected)
    packed = evolve_packed(np.array([number(state)], np.uint64), len(state), steps)
    assert packed.dtype == np.uint64
    assert int(packed[0]) == number(expected)


@pytest.mark.parametrize("cells", [3, 5, 6, 7, 9])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_probability_of_one_counts_all_states(cells, steps):
    states = ("".join(bits) for bits in itertools.product("01", repeat=cells))
    firsts = [solve(state, steps)[0] == "1" for state in states]
    assert probability_of_one(cells, steps) == np.mean(firsts)


def test_the_floor_of_the_paper():
    floor = Rule110(PAPER).floor(32)
    assert floor.answer == pytest.approx(0.56166, abs=5e-6)
    assert floor.exact == pytest.approx(0.0995, abs=5e-5)


def test_several_cells_of_one_state_depend_on_each_other_and_have_no_exact_floor():
    config = Rule110Config(cells=12, strings=2, steps=(1,), cells_asked=12, questions=12, window=12)
    assert Rule110(config).floor(1).exact is None


def test_many_cells_are_sampled_and_come_close_to_fewer_counted_ones():
    assert probability_of_one(40, 4) == probability_of_one(40, 4)
    # Four steps see nine cells, so the size of a larger ring does not matter.
    assert probability_of_one(40, 4) == pytest.approx(probability_of_one(12, 4), abs=5e-4)


def test_always_answering_the_majority_scores_the_floor():
    config = Rule110Config(cells=16, strings=4, steps=(8,), questions=4, window=16)
    task = Rule110(config)
    count, floor = 2500, task.floor(8)
    majority = int(probability_of_one(16, 8) > 0.5)
    right_NQ = np.zeros((count, 4), bool)
    for index in range(count):
        example = task.example("test", index)
        right_NQ[index] = example.targets_WL[example.mask_WL] == majority
    for outcomes, p in ((right_NQ.ravel(), floor.answer), (right_NQ.all(-1), floor.exact)):
        assert abs(outcomes.mean() - p) < 4 * (p * (1 - p) / outcomes.size) ** 0.5


@pytest.mark.parametrize("config", [LAPTOP, PAPER], ids=["laptop", "paper"])
def test_train_and_test_never_share_a_state_whatever_the_seed(config):
    seen = {}
    for split in ("train", "test"):
        for seed in (0, 1):
            task = Rule110(Rule110Config(**{**vars(config), "seed": seed}))
            examples = (task.example(split, i) for i in range(1000))
            seen.setdefault(split, set()).update(
                state for example in examples for state in states_of(config, example)
            )
    assert not seen["train"] & seen["test"]
    for split, states in seen.items():
        identities = (state_identity(number(state), config.cells) for state in states)
        assert {split_of(identity, config.test_fraction) for identity in identities} == {split}


def test_the_split_is_pinned_for_ever():
    drawn = [split_of(state_identity(state, 24), 0.5) for state in range(6)]
    assert drawn == ["test", "train", "test", "train", "test", "test"]


def test_the_curriculum_opens_steps_one_by_one_and_only_in_training():
    task = Rule110(Rule110Config(**{**vars(LAPTOP), "curriculum": 400}))
    asked = np.array([task.example("train", i).depth_WL.max() for i in range(600)])
    allowed = np.array(LAPTOP.steps)[np.minimum(3, np.arange(600) // 100)]
    assert (asked <= allowed).all()
    for start in range(0, 600, 100):
        assert asked[start : start + 100].max() == allowed[start]
    assert max(task.example("test", i).depth_WL.max() for i in range(30)) == 8


def test_paper_sizes():
    task = Rule110(PAPER)
    assert task.num_windows == 5
    assert task.vocab_size == 2 + 4
    assert task.scored_per_window == (0, 0, 0, 0, 4)
    assert task.example("test", 0).length_W.tolist() == [24, 24, 24, 24, 4]
