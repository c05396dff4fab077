"""Confidence intervals of accuracies. Pure functions."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 2000


def wilson(right: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927). It stays within [0, 1] and is accurate for few questions.

    Two-sided, for `total` > 0 independently drawn questions.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(right: Sequence[np.ndarray], *, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean accuracy over tasks; questions are resampled within each task.

    Args:
        right: bool [questions] for each task.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    # Resampling right-or-wrong answers is a binomial draw of their number.
    means = np.mean([rng.binomial(len(each), each.mean(), _RESAMPLES) / len(each) for each in right], axis=0)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
