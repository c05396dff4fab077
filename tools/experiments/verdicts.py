"""Judges rules: pass, fail, or not testable with the reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tools.experiments.statistics import Paired, differences, log_eta, on_lines, paired
from tools.experiments.study import Study
from tools.experiments.values import (
    ArmValue,
    ConstantValue,
    EtaValue,
    InterpolatedValue,
    RatioValue,
    SumValue,
    Value,
    ValueRule,
    arms_of,
)

Record = Mapping[str, Any]
Records = Mapping[tuple[str, int], Record]  # by (arm, seed)
Outcome = Literal["pass", "fail", "not testable here"]


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    paired: Statistics of lower - higher; None if there is no bound.
    by_seed: The differences.
    reason: Why it is not testable, else empty.
    """

    rule: ValueRule
    outcome: Outcome
    paired: Paired | None
    by_seed: Mapping[int, float]
    reason: str = ""


def judge(study: Study, records: Records) -> list[Verdict]:
    """A verdict for each rule, from all seeds that its arms share."""
    return [_judge(study, rule, records) for rule in study.rules]


def _judge(study: Study, rule: ValueRule, records: Records) -> Verdict:
    if study.not_testable:
        return Verdict(rule, "not testable here", None, {}, study.not_testable)
    arms = [name for value in (rule.lower, rule.higher) for name in arms_of(value)]
    seeds = set.intersection(*(set(study.seeds_of(study.arms[name])) for name in arms))
    missing = sorted({f"{arm} seed {seed}" for arm in arms for seed in seeds if (arm, seed) not in records})
    if missing:
        return Verdict(rule, "not testable here", None, {}, f"no record yet of {', '.join(missing)}")
    lower, higher = ({seed: value_of(value, records, seed) for seed in seeds} for value in (rule.lower, rule.higher))
    lost = sorted(seed for seed in seeds if lower[seed] is None or higher[seed] is None)
    if lost:
        return Verdict(rule, "not testable here", None, {}, f"no value for seed {', '.join(map(str, lost))}: {_why(rule)}")
    by_seed = differences(
        {seed: value for seed, value in lower.items() if value is not None},
        {seed: value for seed, value in higher.items() if value is not None},
    )
    try:
        found = paired(list(by_seed.values()))
    except ValueError as error:
        return Verdict(rule, "not testable here", None, by_seed, str(error))
    holds = found.upper < rule.margin if rule.by == "bound" else found.mean <= rule.margin
    return Verdict(rule, "pass" if holds else "fail", found, by_seed)


def value_of(value: Value, records: Records, seed: int) -> float | None:
    """A value for one seed; None if the records do not have it."""
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
            arm, of = (curve_of(records[name, seed], value.cost, value.part) for name in (value.eta, value.of))
            return log_eta(arm, of)
        case SumValue():
            terms = [number_at(records[term.arm, seed], term.metric) for term in value.sum]
            known = [term.times * number for term, number in zip(value.sum, terms, strict=True) if number is not None]
            return sum(known) if len(known) == len(terms) else None
        case RatioValue():
            return _rise(records[value.arm, seed], value)


def number_at(record: Record, path: str) -> float | None:
    """A number of a record by its dotted path."""
    found: Any = record
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def of_arm(records: Records, arm: str) -> dict[int, Record]:
    """The records of an arm by seed."""
    return {seed: record for (name, seed), record in sorted(records.items()) if name == arm}


def curve_of(record: Record, cost: str, part: str) -> Sequence[tuple[float, float]]:
    """Points (cost, held-out loss of a part) of a run, by rising cost."""
    return [(point[cost], point["loss"][part]) for point in record.get("curve", []) if part in point["loss"]]


def _rise(record: Record, value: RatioValue) -> float | None:
    for point in record.get("probes", {}).get(value.probe, []):
        if point["at"] == value.at:
            return value.factor * (point["loss"][value.part] - record["loss"][value.part])
    return None


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
