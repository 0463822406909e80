"""95% intervals: of a share of examples, of a mean per token, and of a mean over seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

_NORMAL_QUANTILE = 1.959963984540054  # 97.5%
_CONFIDENCE_TAIL = 0.975


class Estimate(NamedTuple):
    """A share in [0, 1], or a mean per token, with its two-sided 95% interval."""

    mean: float
    low: float
    high: float


def wilson(share: float, n: float) -> Estimate:
    """The Wilson score interval of a share that was seen in n independent trials.

    Raises:
      ValueError: n is not above 0, or the share lies outside [0, 1].
    """
    if n <= 0 or not 0.0 <= share <= 1.0:
        raise ValueError(f"needs n > 0 and a share in [0, 1]; got n={n}, share={share}")
    z2 = _NORMAL_QUANTILE**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    spread = share * (1 - share) / n + z2 / (4 * n * n)
    half = _NORMAL_QUANTILE / (1 + z2 / n) * math.sqrt(spread)
    # Rounding must not push a bound past the share itself at 0 and 1.
    return Estimate(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def ratio(sums, counts) -> Estimate:
    """The mean of everything that was counted, when examples and not tokens are independent.

    Student's t on the linearised ratio: what an example adds beyond the mean of its tokens. Of a
    single example no interval is known, and it has no width; of a mean that is not finite, its
    ends are NaN.

    Args:
      sums: of each example.
      counts: of each example, above 0.

    Raises:
      ValueError: no example.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if not len(sums):
        raise ValueError("a mean needs one example or more; got none")
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Estimate(mean, mean, mean)
    if not math.isfinite(mean):
        return Estimate(mean, math.nan, math.nan)
    beyond = sums - mean * counts
    error = math.sqrt(len(sums) / (len(sums) - 1) * float(beyond @ beyond)) / float(counts.sum())
    half = float(special.stdtrit(len(sums) - 1, _CONFIDENCE_TAIL)) * error
    return Estimate(mean, mean - half, mean + half)


def student_t(shares: Sequence[float]) -> Estimate:
    """The mean of one share per seed; its interval assumes normal seeds and is clipped to [0, 1].

    Raises:
      ValueError: fewer than two values.
    """
    if len(shares) < 2:
        raise ValueError(f"an interval over seeds needs two or more; got {len(shares)}")
    mean = statistics.fmean(shares)
    quantile = float(special.stdtrit(len(shares) - 1, _CONFIDENCE_TAIL))
    half = quantile * statistics.stdev(shares) / math.sqrt(len(shares))
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))
