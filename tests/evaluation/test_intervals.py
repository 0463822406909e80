"""95% intervals against scipy's and against numbers from a table."""

import pytest
from scipy import stats

from sleepnet.evaluation.intervals import student_t, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 20), (3, 10), (127, 128), (1024, 1024)])
def test_wilson_is_the_textbook_interval(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    mean, low, high = wilson(right / n, n)
    assert mean == right / n
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= mean <= high <= 1


def test_three_seeds_use_the_quantile_4_303():
    mean, low, high = student_t([0.50, 0.52, 0.54])
    half = 4.303 * 0.02 / 3**0.5
    assert (mean, low, high) == pytest.approx((0.52, 0.52 - half, 0.52 + half), abs=1e-5)


def test_an_interval_over_seeds_stays_a_share():
    assert student_t([0.9, 0.95, 1.0]).high == 1.0
    assert student_t([0.0, 0.1]).low == 0.0


@pytest.mark.parametrize(
    "bad", [lambda: wilson(0.5, 0), lambda: wilson(1.1, 9), lambda: student_t([1])]
)
def test_no_interval_out_of_nothing(bad):
    with pytest.raises(ValueError, match="got"):
        bad()
