"""Medians and their intervals equal slow reference computations, and ratios are paired by round."""

from math import comb

import numpy as np
import pytest

from research.bench.measure import log_log_slope, median_interval, paired_ratio
from tests.support.messages import refused


def slow_rank(n: int) -> int:
    """Returns the largest l with 2 P(Binomial(n, 1/2) < l) <= 0.05, by enumerating all 2^n outcomes of n coin flips."""
    best = 0
    for rank in range(1, n // 2 + 1):
        if 2 * sum(comb(n, k) for k in range(rank)) / 2**n <= 0.05:
            best = rank
    return best


@pytest.mark.parametrize("n", [6, 9, 20, 21, 40])
def test_the_interval_lies_between_the_ranks_of_the_sign_test(n: int) -> None:
    values = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))  # each value equals its rank
    interval = median_interval(values)
    assert (interval.low, interval.high) == (slow_rank(n), n + 1 - slow_rank(n))
    assert interval.median == np.median(values)
    assert interval.n == n


def test_few_values_give_all_of_them() -> None:
    interval = median_interval([3.0, 1.0, 2.0])
    assert (interval.low, interval.median, interval.high) == (1.0, 2.0, 3.0)
    with refused(ValueError):
        median_interval([])


def test_ratios_are_paired() -> None:
    """If both times of some rounds double, the ratio of medians changes, but the median of the rounds' ratios does not."""
    slow = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    interval = paired_ratio(3 * slow, 2 * slow)
    assert (interval.low, interval.median, interval.high) == (1.5, 1.5, 1.5)
    with refused(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def test_slope() -> None:
    assert log_log_slope([1, 2, 4], [5, 10, 20]) == pytest.approx(1.0)
    assert log_log_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
