"""Judges the rules of an experiment by the statistics of paired runs: pass, fail, or not testable with the reason.

Runs of all arms with the same seed share data, order of data and base weights. The difference d_i between two arms is
therefore taken between runs with seed i. The one-sided bounds of the mean difference over n seeds (Student's t) with the
confidence c (by default 0.95) are

    mean d +- t(c, n - 1) s / sqrt(n),   s^2 = sum (d_i - mean d)^2 / (n - 1)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from research.experiments.rules import (
    CONFIDENCE,
    ArmValue,
    ConstantValue,
    EtaValue,
    InterpolatedValue,
    RatioValue,
    SumValue,
    Value,
    ValueRule,
)
from research.experiments.study import Study

LARGE = 1e4  # larger differences, such as differences in FLOPs, are written with four significant digits
Record = Mapping[str, Any]
Records = Mapping[tuple[str, int], Record]  # records by (arm, seed)
Outcome = Literal["pass", "fail", "not testable here"]


@dataclass(frozen=True)
class Paired:
    """The mean and the standard deviation of n paired differences, and two one-sided bounds of the mean."""

    n: int
    mean: float
    deviation: float
    lower: float
    upper: float


def paired(differences: Sequence[float], confidence: float = CONFIDENCE) -> Paired:
    """Computes mean, standard deviation and one-sided bounds of paired differences.

    Raises:
        ValueError: there are fewer than two differences, or a difference is not finite, so that no bound exists.
    """
    from scipy.stats import t  # the import takes a second, and only a report needs it

    values = np.asarray(differences, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"a bound needs two finite differences at least, got {list(differences)}")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    reach = float(t.ppf(confidence, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Paired(len(values), mean, deviation, mean - reach, mean + reach)


def on_lines(points: Sequence[tuple[float, float]], x: float, *, reach: float) -> float | None:
    """Interpolates linearly between points at x. The first and the last line extend by `reach`. Returns None if x is beyond
    these extensions, or if two points have the same x."""
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
    """Returns the cost at which the loss of a curve of (cost, loss) first falls to `loss`. Interpolates in ln cost.

    Returns None if the curve never reaches the loss, or if it starts below the loss, so that the cost is unknown.
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
    """Returns ln eta, a ratio of costs, from two curves of (cost, loss).

    eta is the whole cost of `of` divided by the cost at which `arm` reaches the last loss of `of`. If `arm` never reaches
    this loss, eta is below 1. It is then the cost at which `of` reaches the last loss of `arm`, divided by the whole cost
    of `arm`. Returns None for a curve without points, or if the curve that must reach a loss starts below this loss.
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
    """Returns two rows [2, points]: the costs of `curve`, and by how many nats `curve` is above `of` at each cost.

    Args:
        curve, of: [2, points] of (cost, loss), by rising cost. `of` is interpolated in ln cost, and is constant up to 1 %
            beyond its ends. At other costs the result is nan.
    """
    known = (curve[0] >= 0.99 * of[0][0]) & (curve[0] <= 1.01 * of[0][-1])
    return np.stack([curve[0], np.where(known, curve[1] - np.interp(np.log(curve[0]), np.log(of[0]), of[1]), np.nan)])


@dataclass(frozen=True)
class Verdict:
    """The verdict on a rule."""

    rule: ValueRule
    outcome: Outcome
    paired: Paired | None = None  # statistics of the differences lower - higher; None if they cannot be computed
    reason: str = ""  # why the rule is not testable


def judge(study: Study, records: Records) -> list[Verdict]:
    """Judges each rule by the seeds that its arms have in common. A rule is not testable until all records of its arms
    exist. If a gate fails, no rule is testable, but the verdicts still have the statistics of existing records."""
    verdicts = [_judge(study, rule, records) for rule in study.rules]
    if reason := study.not_testable or failed_gates(judge_gates(study, records)):
        return [replace(verdict, outcome="not testable here", reason=reason) for verdict in verdicts]
    return verdicts


def judge_gates(study: Study, records: Records) -> list[Verdict]:
    """Judges each gate as a rule."""
    return [_judge(study, gate, records) for gate in study.gates]


def failed_gates(gates: Sequence[Verdict]) -> str:
    """Describes gates that fail, with the measured figures, and gates that are not judged yet; empty if all gates hold."""
    words = {"fail": "gate not held", "not testable here": "gate not judged"}
    return "; ".join(f"{words[each.outcome]}: {each.rule.claim} {numbers(each)}" for each in gates if each.outcome in words)


def numbers(verdict: Verdict) -> str:
    """Describes a verdict's mean difference, its bounds and its rule. If the rule is not testable, gives the reason."""
    if verdict.paired is None:
        return f"({verdict.reason})"
    found = verdict.paired
    asked = f"upper < {verdict.rule.margin:g}" if verdict.rule.by == "bound" else f"mean <= {verdict.rule.margin:g}"
    digits = "+.4f" if abs(found.mean) < LARGE else "+.4g"
    mean, lower, upper = (format(each, digits) for each in (found.mean, found.lower, found.upper))
    reason = f" ({verdict.reason})" if verdict.reason else ""
    return f"{mean} [{lower}, {upper}], n = {found.n}; asked: {asked}{reason}"


def _judge(study: Study, rule: ValueRule, records: Records) -> Verdict:
    seeds = _seeds(study, rule)
    missing = sorted({f"{arm} seed {seed}" for arm in rule.arms for seed in seeds if (arm, seed) not in records})
    if missing:
        return Verdict(rule, "not testable here", reason=f"no record yet of {', '.join(missing)}")
    if lost := [str(seed) for seed in seeds if _difference(rule, records, seed) is None]:
        return Verdict(rule, "not testable here", reason=f"no value for seed {', '.join(lost)}: {_why(rule)}")
    try:
        found = paired(differences(study, rule, records), study.confidence)
    except ValueError as error:
        return Verdict(rule, "not testable here", reason=str(error))
    holds = found.upper < rule.margin if rule.by == "bound" else found.mean <= rule.margin
    return Verdict(rule, "pass" if holds else "fail", found)


def differences(study: Study, rule: ValueRule, records: Records) -> list[float]:
    """Returns the difference (lower - higher) of each seed for which `records` has both values."""
    found = (_difference(rule, records, seed) for seed in _seeds(study, rule))
    return [each for each in found if each is not None]


def _seeds(study: Study, rule: ValueRule) -> list[int]:
    return sorted(set.intersection(*(set(study.seeds_of(study.arms[name])) for name in rule.arms)))


def _difference(rule: ValueRule, records: Records, seed: int) -> float | None:
    lower, higher = (value_of(value, records, seed) for value in (rule.lower, rule.higher))
    return None if lower is None or higher is None else lower - higher


def value_of(value: Value, records: Records, seed: int) -> float | None:
    """Returns the number that a rule's `value` has for one seed; None if the records lack this number."""
    match value:
        case ConstantValue():
            return value.constant
        case ArmValue():
            return number_at(records[value.arm, seed], value.metric)
        case InterpolatedValue():
            points = [
                (number_at(records[arm, seed], value.x), number_at(records[arm, seed], value.y)) for arm in value.through
            ]
            at = number_at(records[value.at, seed], value.x)
            known = [(x, y) for x, y in points if x is not None and y is not None]
            return None if at is None or len(known) < len(points) else on_lines(known, at, reach=value.reach)
        case EtaValue():
            arm, of = (curve_of(records[name, seed], value.cost, value.part, value.loss) for name in (value.eta, value.of))
            return log_eta(arm, of)
        case SumValue():
            terms = [number_at(records[term.arm, seed], term.metric) for term in value.sum]
            known = [term.times * number for term, number in zip(value.sum, terms, strict=True) if number is not None]
            return sum(known) if len(known) == len(terms) else None
        case RatioValue():
            record = records[value.arm, seed]
            probed = [point for point in record.get("probes", {}).get(value.probe, []) if point["at"] == value.at]
            return value.factor * (probed[0]["loss"][value.part] - record["loss"][value.part]) if probed else None


def number_at(record: Record, path: str) -> float | None:
    """Returns the number at a dotted path in a record; None if there is no number."""
    found: Any = record
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def of_arm(records: Records, arm: str) -> dict[int, Record]:
    """Returns the records of an arm by seed."""
    return {seed: record for (name, seed), record in sorted(records.items()) if name == arm}


def curve_of(record: Record, cost: str, part: str, loss: str = "heldout") -> Sequence[tuple[float, float]]:
    """Returns the points (cost, loss) of a run's curve, by rising cost. The loss is the held-out or training loss of
    `part`. Records that were made before training losses were kept have no point of a training loss."""
    key = "training" if loss == "training" else "loss"
    return [(point[cost], point[key][part]) for point in record.get("curve", []) if part in point.get(key, ())]


def _why(rule: ValueRule) -> str:
    for value in (rule.lower, rule.higher):
        if isinstance(value, InterpolatedValue):
            return (
                f"the {value.x} of {value.at} lies more than {value.reach:g} beyond that of {', '.join(value.through)}, "
                "or two of these have the same"
            )
        if isinstance(value, EtaValue):
            return f"{value.eta} or {value.of} has no curve, or reaches the other's last loss before its own first point"
    return "the record lacks it"
