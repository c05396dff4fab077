"""Judges benchmark rows: says which rules hold, and why the others do not.

A row is lost if the 95 % interval of its paired ratio lies wholly above 1.05, because ours is then more than 5 % slower.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LOST_ABOVE = 1.05
FLOOR_LIMIT, FLOOR_AIM = 1.25, 1.10
NAIVE_FACTOR = 1.8
MIN_TOKENS, MIN_HIDDEN = 4096, 512
SLOPE = FLATNESS = (0.9, 1.1)
RIVALS = ("ours / megatron", "ours / megatron, capacity")
FLOORS = ("dispatch, combine / floor", "dispatch, combine / floor, all")
# Sweeps of whole layers and steps. There Megatron-Core's default branch, with remapped null choices, is a rival too.
WHOLE = ("layer", "step")
NOT_EXPLAINED = "not explained yet"
# For each comparison and sweep ("" for all sweeps): the reason why a rule does not hold, and what was tried.
EXPLANATIONS: Mapping[str, Mapping[str, str]] = {
    "dispatch, combine / floor": {
        "": "this floor leaves out the rows for experts on the own rank, half of all rows at two ranks; 'floor, all' has "
        "them; tried: copying these rows during the exchange (no gain where the exchange runs on the same cores), "
        "embedding_bag for the sums (0.3 ms of 11), index_copy_ for first terms (slower)",
    },
    "dispatch, combine / floor, all": {
        "null fraction": "with so few rows the fixed costs show: the exchange of weights, and writing all of y; tried: the "
        "exchange of weights already overlaps the exchange of rows; without it the rows would have to carry the weights",
    },
    "ours / naive": {
        "": "the median meets the rule, but the interval is wide; tried: nothing, because the neighbours of the row meet it"
    },
    "time over tokens": {
        "": "time grows more slowly than the tokens because of fixed costs of 1 to 4 ms: the exchange of weights and, with "
        "the plan, the exchanges of counts and indices and a host sync; tried: indices of pairs are exchanged while tokens "
        "are looked up",
    },
}


@dataclass(frozen=True)
class BenchResult:
    """One judged comparison."""

    row: str  # key of the row, '<sweep>/<label>'
    comparison: str  # for example 'ours / megatron'
    rule: str
    ratio: float  # median of our time over the rival's
    low: float  # the interval of the ratio
    high: float
    met: bool  # true if the rule holds
    reason: str = ""  # why the rule does not hold


def judge(rows: Mapping[str, Any]) -> list[BenchResult]:
    """Judges all rows of a file; comparisons whose rule does not hold come first."""
    return sorted((each for key, row in rows.items() for each in _judge_row(key, row)), key=lambda each: each.met)


def _judge_row(key: str, row: Mapping[str, Any]) -> Iterator[BenchResult]:
    if key.startswith("scaling/"):
        yield from _judge_scaling(key, row)
        return
    point = row["point"]
    whole = key.partition("/")[0] in WHOLE
    rivals = (*RIVALS, "ours / megatron, remapped") if whole else RIVALS
    in_region = whole or (point.get("tokens", 0) >= MIN_TOKENS and point.get("hidden", 0) >= MIN_HIDDEN)
    for comparison, ratio in row["ratio"].items():
        low, high = ratio["low"], ratio["high"]
        if comparison in rivals:
            yield _result(key, comparison, f"not lost (interval not wholly above {LOST_ABOVE})", ratio, low <= LOST_ABOVE)
        elif comparison in FLOORS and in_region:
            rule = f"within {FLOOR_LIMIT - 1:.0%} of the floor (aim {FLOOR_AIM - 1:.0%})"
            yield _result(key, comparison, rule, ratio, ratio["median"] <= FLOOR_LIMIT)
        elif comparison == "ours / naive" and in_region and point.get("null") == 0.5 and point.get("top_k", 0) >= 2:
            rule = f"at least {NAIVE_FACTOR} times faster than the naive sender"
            yield _result(key, comparison, rule, ratio, high <= 1 / NAIVE_FACTOR)


def _judge_scaling(key: str, row: Mapping[str, Any]) -> Iterator[BenchResult]:
    if row["by"] == "tokens":
        slope = row["log-log slope of time"]
        exact = {"median": slope, "low": slope, "high": slope}
        yield _result(key, "time over tokens", f"log-log slope in {SLOPE}", exact, SLOPE[0] <= slope <= SLOPE[1])
        return
    for label, ratio in row["cost a row / the first's"].items():
        met = FLATNESS[0] <= ratio["median"] <= FLATNESS[1]
        yield _result(f"{key} {label}", "cost a row / the first's", f"within {FLATNESS}", ratio, met)


def _result(key: str, comparison: str, rule: str, ratio: Mapping[str, float], met: bool) -> BenchResult:
    known = EXPLANATIONS.get(comparison, {})
    reason = "" if met else known.get(key.partition("/")[0], known.get("", NOT_EXPLAINED))
    return BenchResult(key, comparison, rule, ratio["median"], ratio["low"], ratio["high"], met, reason)
