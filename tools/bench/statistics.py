"""Medians, and intervals that make no assumption about the distribution of times."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A median, and an interval that contains the true median with probability CONFIDENCE or more."""

    median: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def median_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Median of independent values, with an interval between two of them by the sign test.

    The true median lies below the l-th smallest value only if fewer than l of n values are below it, which has probability
    P(Binomial(n, 1/2) < l); the same holds above. The interval uses the largest l for which both probabilities sum to at
    most 1 - CONFIDENCE. Below 6 values there is none, and the interval spans all values.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("no values: a median needs one at least")
    outside, rank = 0.0, 0
    while 2 * (outside + math.comb(n, rank) / 2**n) <= 1 - CONFIDENCE:
        outside += math.comb(n, rank) / 2**n
        rank += 1
    low = max(rank, 1) - 1
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[n - 1 - low]), n)


def paired_ratio(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> Interval:
    """Median of ours / theirs, each ratio from one round, so that a disturbance of a round affects both."""
    ours_n, theirs_n = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours_n.shape != theirs_n.shape:
        raise ValueError(f"{ours_n.size} values cannot be paired with {theirs_n.size}")
    return median_interval(ours_n / theirs_n)


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares slope of log y over log x: 1 if y is proportional to x."""
    return float(np.polyfit(np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64)), 1)[0])
