"""The statistics of paired runs, on which every verdict rests.

Runs of one seed share data, order and base weights, so differences between arms are taken seed by seed:

    mean d +- t(0.95, n - 1) s / sqrt(n),   s^2 = sum (d_i - mean d)^2 / (n - 1)

are the one-sided 95 % bounds of the mean difference (Student's t; the quantile is scipy's). "Not worse" requires an upper
bound below MARGIN nats, "better" one below 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

CONFIDENCE = 0.95
MARGIN = 0.02  # nats


@dataclass(frozen=True)
class Paired:
    """Differences of n pairs: their mean and standard deviation, and the two one-sided bounds of the mean."""

    n: int
    mean: float
    deviation: float
    lower: float
    upper: float


def paired(differences: Sequence[float]) -> Paired:
    """Mean and one-sided bounds of paired differences.

    Raises:
        ValueError: fewer than two pairs, or a value that is not finite, so that no bound exists.
    """
    from scipy.stats import t  # slow to import, and only a report needs it

    values = np.asarray(differences, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"a bound needs two finite differences at least, got {list(differences)}")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    reach = float(t.ppf(CONFIDENCE, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Paired(len(values), mean, deviation, mean - reach, mean + reach)


def differences(left: Mapping[int, float], right: Mapping[int, float]) -> dict[int, float]:
    """left - right, for seeds that both have."""
    return {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}


def on_lines(points: Sequence[tuple[float, float]], x: float, *, reach: float) -> float | None:
    """The value at x of the straight lines through points sorted by x; the outermost lines are extended by `reach`.

    None farther out, or if two points share an x.
    """
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
    """Cost at which a curve of (cost, loss) first reaches a loss, interpolated in ln cost.

    None if it never does, or if it starts below: the cost to get there is then unknown.
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
    """ln eta of two curves of (cost, loss).

    eta is the whole cost of `of` over the cost at which `arm` reaches the last loss of `of`. If it never does, the inverse
    case, below 1: the cost at which `of` reaches the arm's last loss over the arm's whole cost. None without points, or if
    the loss is reached before the first of them.
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
    """A curve's distance from another at the curve's own costs, [2, points]: cost and nats over `of`.

    Args:
        curve, of: [2, points] of (cost, loss), by rising cost. `of` is interpolated in ln cost. Up to 1 % beyond its ends
            it is constant, farther off the distance is nan.
    """
    known = (curve[0] >= 0.99 * of[0][0]) & (curve[0] <= 1.01 * of[0][-1])
    return np.stack([curve[0], np.where(known, curve[1] - np.interp(np.log(curve[0]), np.log(of[0]), of[1]), np.nan)])
