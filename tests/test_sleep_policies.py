"""Policies decide from what was spent alone; and the sleep that they steer is the sleep."""

import itertools
import math

import jax
import minds
import numpy as np
import pytest
from agreement import assert_agree, assert_identical
from minds import CONFIGS
from reference import Mind, fast_weights
from test_session import CONFIG, L, life, older, session

import sleepnet
from sleepnet import ConfigError, FixedPasses, Spent, UntilStill, WithinSeconds, sleep_by
from sleepnet.cycle.sleep import _relative_change


def evening(config=CONFIG):
    """A mind with a past, its window not full."""
    return older(config=config).state


def sleep(policy, state, config=CONFIG, **options):
    return sleep_by(policy, minds.params(config), state, config=config, **options)


def passes_of(policy, changes=(1.0,) * 99, seconds_each=1.0) -> int:
    """How many it wants where the passes behind the first move and take so much."""
    spent = Spent()
    for change in changes:
        if not policy.goes_on(spent):
            return spent.passes
        passes = spent.passes + 1
        spent = Spent(passes=passes, seconds=(passes - 1) * seconds_each, change=change)
    raise AssertionError(f"{policy} never stops")


def test_policies_are_pure_functions_of_what_was_spent():
    assert passes_of(FixedPasses(5)) == 5
    halves = [2.0**-k for k in range(20)]
    assert passes_of(UntilStill(change=0.1), halves) == 6  # 1, 1/2, 1/4, 1/8, 1/16 behind the first
    assert passes_of(UntilStill(change=0.1, at_most=3), halves) == 3
    assert passes_of(UntilStill(at_most=1)) == passes_of(WithinSeconds(seconds=9, at_most=1)) == 1
    assert passes_of(WithinSeconds(seconds=5), seconds_each=2.0) == 3  # a third would end at 6
    assert passes_of(WithinSeconds(seconds=6), seconds_each=2.0) == 4
    assert passes_of(WithinSeconds(seconds=1), seconds_each=2.0) == 2  # the first is not known
    assert passes_of(WithinSeconds(seconds=6, at_most=3), seconds_each=2.0) == 3


@pytest.mark.optimized
def test_a_fixed_number_is_the_sleep_bit_for_bit():
    state = evening()
    for passes in (1, 3):
        slept, spent = sleep(FixedPasses(passes), state)
        expected = sleepnet.sleep(minds.params(CONFIG), state, config=CONFIG, passes=passes)
        assert_identical(slept, expected)
        assert spent.passes == passes and spent.seconds > 0 and spent.change is None


@pytest.mark.parametrize(
    "config",
    [CONFIG, *(pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS.values())],
    ids=["small", *CONFIGS],
)
def test_pass_by_pass_is_the_sleep(config):
    """As many passes as it wanted: fast weights, kept keys, tails and an empty window."""
    state = evening(config)
    before = jax.tree.map(np.array, state)
    for at_most in (1, 3):
        slept, spent = sleep(UntilStill(change=1e-9, at_most=at_most), state, config)
        assert spent.passes == at_most
        expected = sleepnet.sleep(minds.params(config), state, config=config, passes=at_most)
        assert_agree(slept, expected)
    assert_identical(state, before)


def test_the_change_is_how_far_the_last_pass_moved_the_core():
    """By the float64 model; and what moved less is still."""
    one, tokens = session(), life(4, [L])[0]
    one.feed(tokens)
    cores = []
    for passes in (2, 3):
        mind = Mind(minds.params(CONFIG), CONFIG)
        mind.live(tokens, passes)
        cores.append(fast_weights([mind])["core"][1])  # the G of "AG"
    moved = np.linalg.norm(cores[1] - cores[0]) / np.linalg.norm(cores[1])
    _, spent = sleep(UntilStill(change=1e-9, at_most=3), one.state)
    assert spent.change == pytest.approx(moved, rel=1e-4)
    _, spent = sleep(UntilStill(change=1.01 * moved, at_most=9), one.state)
    assert 2 <= spent.passes <= 3


def test_every_row_has_a_change_of_its_own():
    """Over all blocks together; and without fast weights in the core nothing moves."""
    rng = np.random.default_rng(0)
    before, after = (
        (None, *(rng.normal(size=(R, 3, 2, 4, 5)).astype(np.float32) for R in (1, 2)))
        for _ in range(2)
    )
    for row, change in enumerate(_relative_change(before, after)):
        a, b = (np.concatenate([x[:, row].ravel() for x in xs[1:]]) for xs in (before, after))
        assert change == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(b), rel=1e-5)
    assert _relative_change((None, None), (None, None)) == 0


def test_a_budget_is_kept_by_the_clock():
    """Thirteen seconds, and a clock by which a pass takes three: four passes behind the first."""
    state, ticks = evening(), itertools.count(step=3)
    _, spent = sleep(WithinSeconds(seconds=13), state, clock=lambda: next(ticks))
    assert spent.passes == 5 and spent.seconds == 15  # with the end


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: FixedPasses(0), "passes must be an integer of 1 or more; got 0"),
        (lambda: FixedPasses(2.0), "passes must be .*; got 2.0"),
        (lambda: UntilStill(change=0), "change must be a number above 0; got 0"),
        (lambda: UntilStill(at_most=-1), "at_most must be .* got -1"),
        (lambda: WithinSeconds(seconds=math.nan), "seconds must be a number above 0; got nan"),
        (lambda: WithinSeconds(seconds="1"), "seconds must be .* got '1'"),
    ],
)
def test_what_no_sleep_can_be_is_told_when_it_is_made(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()
