"""Tests the report's verdicts on made-up numbers, and the tables and the figure that the report makes from a file."""

from typing import Any

from research.bench.report import judge, markdown, text


def interval(median: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"median": median, "low": low or median, "high": high or median, "n": 20}


def row(ratios: dict[str, dict[str, float]], **point: Any) -> dict[str, Any]:
    sent = {"rows": 10, "payload_bytes": 80, "other_bytes": 8, "calls": 4}
    return {
        "point": {"tokens": 4096, "hidden": 512, "top_k": 2, "null": 0.5, **point},
        "milliseconds": {"ours": interval(3.0)},
        "ratio": ratios,
        "sent": {"ours": sent, "naive": sent},
    }


def not_met(rows: dict[str, Any]) -> list[str]:
    return [finding.comparison for finding in judge(rows) if not finding.met]


def test_a_row_is_lost_where_the_interval_lies_wholly_above() -> None:
    capacity = "ours / megatron, capacity"
    assert not_met({"tokens/4096": row({capacity: interval(1.2, 1.06, 1.4)})}) == [capacity]
    assert not_met({"tokens/4096": row({capacity: interval(1.2, 1.04, 1.4)})}) == []
    assert not_met({"tokens/256": row({capacity: interval(1.2, 1.06, 1.4)}, tokens=256)}) == [capacity]
    assert not_met({"step/x": row({"ours / megatron": interval(1.2)})}) == ["ours / megatron"]


def test_its_default_branch_with_nulls_remapped_is_a_rival_in_whole_layers_and_steps() -> None:
    remapped = "ours / megatron, remapped"
    assert not_met({"layer/x": row({remapped: interval(1.2)}), "step/x": row({remapped: interval(1.2)})}) == [remapped] * 2
    assert judge({"tokens/4096": row({remapped: interval(1.2)})}) == []


def test_the_floor_counts_in_its_region_only() -> None:
    ratios = {"dispatch, combine / floor": interval(1.3), "dispatch, combine / floor, all": interval(1.1)}
    assert not_met({"tokens/4096": row(ratios)}) == ["dispatch, combine / floor"]
    assert not_met({"tokens/2048": row(ratios, tokens=2048)}) == []
    assert not_met({"hidden/256": row(ratios, hidden=256)}) == []
    assert not_met({"tokens/4096": row({"dispatch, combine / floor, all": interval(1.25)})}) == []


def test_the_naive_sender_is_beaten_by_its_factor() -> None:
    assert not_met({"a/b": row({"ours / naive": interval(0.5, 0.4, 0.55)})}) == []
    assert not_met({"a/b": row({"ours / naive": interval(0.5, 0.4, 0.57)})}) == ["ours / naive"]
    assert not_met({"a/b": row({"ours / naive": interval(0.9)}, null=0.0)}) == []
    assert not_met({"a/b": row({"ours / naive": interval(0.9)}, top_k=1)}) == []


def scaling(by: str, slope: float, ratio: float) -> dict[str, Any]:
    return {
        "by": by,
        "milliseconds": {"8": interval(1.0), "128": interval(1.0)},
        "rows": {"8": 5, "128": 5},
        "nanoseconds a row": {"8": interval(2.0), "128": interval(2.0)},
        "cost a row / the first's": {"8": interval(1.0), "128": interval(ratio)},
        "log-log slope of time": slope,
    }


def test_scaling() -> None:
    assert not_met({"scaling/tokens": scaling("tokens", 1.0, 5.0)}) == []
    assert not_met({"scaling/tokens": scaling("tokens", 1.2, 1.0)}) == ["time over tokens"]
    assert not_met({"scaling/experts": scaling("experts", 0.0, 1.08)}) == []
    assert not_met({"scaling/experts": scaling("experts", 0.0, 1.15)}) == ["cost a row / the first's"]


def test_what_is_lost_comes_first_with_a_reason() -> None:
    results = {
        "rows": {
            "tokens/1024": row({"ours / megatron, capacity": interval(0.5)}, tokens=1024),
            "tokens/4096": row({"ours / megatron, capacity": interval(1.5)}),
            "scaling/experts": scaling("experts", 0.0, 1.0),
        }
    }
    lines = text(results).splitlines()
    assert lines[0].startswith("NOT MET: ours / megatron, capacity (not lost")
    assert "It fails in one row, 1.50 (tokens/4096). Why: not explained yet." in lines[0]
    assert lines[1].split()[:2] == ["row", "comparison"]
    assert [line.split()[1] for line in lines[2:5]] == ["tokens/1024", "scaling/experts", "scaling/experts"]
    tables = markdown(results)
    assert "3 of 4 comparisons hold" in tables
    assert "| 1024 | 3.00 | 0.50 [0.50, 0.50] |" in tables
    assert "| 4096 | 10 | 10 | 8 |" in tables


def test_rows_that_fail_for_one_reason_stand_together() -> None:
    lost = {f"tokens/{tokens}": row({"ours / megatron": interval(tokens / 4096, 1.4, 1.6)}) for tokens in (4096, 8192)}
    (line,) = [line for line in markdown({"rows": lost}).splitlines() if "NOT MET" in line]
    assert "in 2 rows, from 1.00 [1.40, 1.60] (tokens/4096) to 2.00 [1.40, 1.60] (tokens/8192). Why" in line
