"""Computes the statistics of paired runs, on which every verdict rests.

Runs with one seed share data, order and base weights, so the difference d_i between two arms is taken for each seed i. The
one-sided 95 % bounds of the mean difference over n seeds are (Student's t)

    mean d +- t(0.95, n - 1) s / sqrt(n),   s^2 = sum (d_i - mean d)^2 / (n - 1)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The mean and standard deviation of n paired differences, and the two one-sided bounds of the mean."""

    n: int
    mean: float
    deviation: float
    lower: float
    upper: float


def paired(differences: Sequence[float]) -> Paired:
    """Computes the mean of paired differences and its one-sided bounds.

    Raises:
        ValueError: there are fewer than two differences, or one is not finite, so that no bound exists.
    """
    from scipy.stats import t  # takes a second to import, and only a report needs it

    values = np.asarray(differences, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"a bound needs two finite differences at least, got {list(differences)}")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    reach = float(t.ppf(CONFIDENCE, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Paired(len(values), mean, deviation, mean - reach, mean + reach)


def on_lines(points: Sequence[tuple[float, float]], x: float, *, reach: float) -> float | None:
    """Interpolates linearly at x between points; the outermost lines extend by `reach`. Returns None farther out, or if two
    points share an x."""
    ordered = sorted(points)
    xs = [each[0] for each in ordered]
    if len(ordered) < 2 or any(a == b for a, b in pairwise(xs)):
        return None
    if not xs[0] - reach <= x <= xs[-1] + reach:
        return None
    at = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    (x0, y0), (x1, y1) = ordered[at - 1], ordered[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def cost_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Returns the cost at which a curve of (cost, loss) first reaches a loss, interpolated in ln cost.

    Returns None if the curve never reaches the loss, or starts below it: then the cost of reaching it is unknown.
    """
    ordered = sorted(curve)
    for place, (cost, here) in enumerate(ordered):
        if here > loss:
            continue
        if place == 0:
            return cost if here == loss else None
        before_cost, before = ordered[place - 1]
        share = (before - loss) / (before - here)
        return math.exp(math.log(before_cost) + share * (math.log(cost) - math.log(before_cost)))
    return None


def log_eta(arm: Sequence[tuple[float, float]], of: Sequence[tuple[float, float]]) -> float | None:
    """Returns ln eta of two curves of (cost, loss).

    eta is the whole cost of `of` over the cost at which `arm` reaches the last loss of `of`. If `arm` never reaches that
    loss, eta is below 1: the cost at which `of` reaches the last loss of `arm`, over the whole cost of `arm`. Returns None
    for a curve without points, or if a curve starts below the loss to reach.
    """
    if not arm or not of:
        return None
    (arm_cost, arm_loss), (of_cost, of_loss) = max(arm), max(of)
    if min(loss for _, loss in arm) <= of_loss:
        reached = cost_to_reach(arm, of_loss)
        return None if reached is None else math.log(of_cost / reached)
    reached = cost_to_reach(of, arm_loss)
    return None if reached is None else math.log(reached / arm_cost)


def at_equal_cost(curve: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Returns the distance of a curve from the curve `of`, at the costs of `curve`, [2, points]: cost and nats above `of`.

    Args:
        curve, of: [2, points] of (cost, loss), by rising cost. `of` is interpolated in ln cost, and is constant up to 1 %
            beyond its ends; farther out the distance is nan.
    """
    known = (curve[0] >= 0.99 * of[0][0]) & (curve[0] <= 1.01 * of[0][-1])
    return np.stack([curve[0], np.where(known, curve[1] - np.interp(np.log(curve[0]), np.log(of[0]), of[1]), np.nan)])
