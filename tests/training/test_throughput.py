"""Goodput: the share of wall time in steps that were taken for the first time."""

import pytest
from hands import Hands

from sleepnet.training.throughput import CLOCK, Clock


@pytest.fixture
def hands():
    """Time in the test's hands."""
    return Hands()


def live(one, hands, *events):
    """(phase, step, seconds in it) one after the other."""
    for phase, step, seconds in events:
        one.enter(phase, step)
        hands.seconds += seconds


def test_only_first_steps_are_productive_over_all_starts(tmp_path, hands):
    """Steps 1 to 3, a crash back to 1, and on to 4: steps 2 and 3 count once."""
    first = Clock(tmp_path, hands)
    live(first, hands, ("compile", 0, 5), ("step", 1, 2), ("step", 2, 2), ("data", 3, 1))
    live(first, hands, ("step", 3, 2), ("save", 3, 1))
    first.save()
    second = Clock(tmp_path, hands)
    live(second, hands, ("restore", 0, 1), ("step", 2, 2), ("step", 3, 2), ("step", 4, 2))
    timing = second.timing()
    assert timing["seconds"] == 20.0
    assert timing["goodput"] == (3 * 2 + 2) / 20
    assert timing["seconds_repeated"] == 4.0
    assert (timing["seconds_compile"], timing["seconds_data"], timing["seconds_save"]) == (5, 1, 1)


def test_a_step_that_a_rollback_takes_again_is_not_productive(tmp_path, hands):
    one = Clock(tmp_path, hands)
    live(one, hands, ("step", 1, 2), ("step", 2, 2), ("restore", 2, 1), ("step", 2, 2))
    assert one.timing()["seconds_repeated"] == 2.0


def test_silence_is_counted_from_the_last_sign_of_life(tmp_path, hands):
    """Whatever is read from the clock meanwhile."""
    one = Clock(tmp_path, hands)
    live(one, hands, ("step", 1, 3))
    one.timing()
    hands.seconds += 1
    assert one.silent_for() == 4.0


def test_a_damaged_clock_begins_anew(tmp_path):
    """Statistics keep no run from going on."""
    (tmp_path / CLOCK).write_text('{"spent": {"st')
    assert Clock(tmp_path).timing()["goodput"] == 0.0
