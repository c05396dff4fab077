"""Judges the rules of an experiment: pass, fail, or not testable with the reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tools.experiments.statistics import Paired, log_eta, on_lines, paired
from tools.experiments.study import (
    ArmValue,
    ConstantValue,
    EtaValue,
    InterpolatedValue,
    RatioValue,
    Study,
    SumValue,
    Value,
    ValueRule,
)

Record = Mapping[str, Any]
Records = Mapping[tuple[str, int], Record]  # by (arm, seed)
Outcome = Literal["pass", "fail", "not testable here"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a rule."""

    rule: ValueRule
    outcome: Outcome
    paired: Paired | None = None  # statistics of lower - higher; None if the rule is not testable
    reason: str = ""  # why the rule is not testable


def judge(study: Study, records: Records) -> list[Verdict]:
    """Judges each rule, from all seeds that the rule's arms share."""
    return [_judge(study, rule, records) for rule in study.rules]


def _judge(study: Study, rule: ValueRule, records: Records) -> Verdict:
    if study.not_testable:
        return Verdict(rule, "not testable here", reason=study.not_testable)
    seeds = sorted(set.intersection(*(set(study.seeds_of(study.arms[name])) for name in rule.arms)))
    missing = sorted({f"{arm} seed {seed}" for arm in rule.arms for seed in seeds if (arm, seed) not in records})
    if missing:
        return Verdict(rule, "not testable here", reason=f"no record yet of {', '.join(missing)}")
    differences, lost = [], []
    for seed in seeds:
        lower, higher = (value_of(value, records, seed) for value in (rule.lower, rule.higher))
        if lower is None or higher is None:
            lost.append(str(seed))
        else:
            differences.append(lower - higher)
    if lost:
        return Verdict(rule, "not testable here", reason=f"no value for seed {', '.join(lost)}: {_why(rule)}")
    try:
        found = paired(differences)
    except ValueError as error:
        return Verdict(rule, "not testable here", reason=str(error))
    holds = found.upper < rule.margin if rule.by == "bound" else found.mean <= rule.margin
    return Verdict(rule, "pass" if holds else "fail", found)


def value_of(value: Value, records: Records, seed: int) -> float | None:
    """Returns a value for one seed; None if the records lack it."""
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
    """Returns the number at a dotted path of a record; None if the path has no number."""
    found: Any = record
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def of_arm(records: Records, arm: str) -> dict[int, Record]:
    """Returns the records of an arm by seed."""
    return {seed: record for (name, seed), record in sorted(records.items()) if name == arm}


def curve_of(record: Record, cost: str, part: str) -> Sequence[tuple[float, float]]:
    """Returns the points (cost, held-out loss of a part) of a run, by rising cost."""
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
