"""95% intervals against scipy's and against numbers from a table."""

import numpy as np
import pytest
from scipy import stats

from sleepnet.evaluation.intervals import ratio, student_t, wilson


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


def test_of_equal_counts_a_mean_per_token_is_that_of_the_examples():
    sums = np.array([3.0, 5.0, 4.0, 8.0])
    low, high = stats.t.interval(0.95, 3, loc=sums.mean() / 2, scale=stats.sem(sums / 2))
    assert ratio(sums, np.full(4, 2)) == pytest.approx((2.5, low, high))


def test_the_interval_of_a_mean_per_token_holds_it_as_often_as_it_says():
    """Examples of different length and level; 2000 draws, so 95% within 5 standard errors."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (2000, 60))
    levels = rng.normal(2.0, 0.5, counts.shape)
    held = [low <= 2.0 <= high for _, low, high in map(ratio, levels * counts, counts)]
    assert np.mean(held) == pytest.approx(0.95, abs=5 * (0.95 * 0.05 / 2000) ** 0.5)


def test_an_interval_over_seeds_stays_a_share():
    assert student_t([0.9, 0.95, 1.0]).high == 1.0
    assert student_t([0.0, 0.1]).low == 0.0


@pytest.mark.parametrize(
    "bad",
    [lambda: wilson(0.5, 0), lambda: wilson(1.1, 9), lambda: student_t([1]), lambda: ratio([], [])],
)
def test_no_interval_out_of_nothing(bad):
    with pytest.raises(ValueError, match="got"):
        bad()
