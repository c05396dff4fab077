"""Measures one row of the dispatch benchmark's table on this rank: all contenders, with the routing of one point."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from moe_dist.parallel.mesh import Mesh
from research.bench.contenders import Case, Run, at_rank, expected, floor, make_case, naive, ours
from research.bench.measure import (
    Effort,
    count_sent,
    log_log_slope,
    measured_row,
    median_interval,
    paired_ratio,
    time_interleaved,
)
from research.bench.megatron_variants import megatron_dispatch, variants
from research.bench.points import Point


@torch.no_grad()
def measure_point(point: Point, mesh: Mesh, effort: Effort) -> dict[str, Any]:
    """Checks the results of all contenders, times the contenders, and counts the rows that each contender sends. All ranks
    return the same table row."""
    case = make_case(point, mesh, seed=effort.seed)
    at_rank_alone: dict[str, Run] = {
        "floor": floor(case, own_rows=False),
        "floor, all": floor(case, own_rows=True),
        "dispatch, combine": at_rank(case, planned=True),
        "ours at rank": at_rank(case, planned=False),
    }
    by_expert = _by_expert(case)
    contenders = {**at_rank_alone, **by_expert}
    for name, run in by_expert.items():
        wanted = expected(case, case.equal_active if name == "equal active" else case.taken)
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    pairs = [(mine, bound) for mine in ("dispatch, combine", "ours at rank") for bound in ("floor", "floor, all")]
    pairs += [("ours", name) for name in by_expert if name != "ours"]
    return measured_row(contenders, mesh, effort, hidden=point.hidden, point=asdict(point), pairs=pairs)


def _by_expert(case: Case) -> dict[str, Run]:
    """Makes the contenders that sort rows by expert and return weighted sums to the tokens."""
    runs: dict[str, Run] = {
        "ours": ours(case, case.taken),
        **{name: megatron_dispatch(case, each) for name, each in variants(nulls=case.point.null > 0.0).items()},
        "naive": naive(case, nulls=True),
    }
    if case.point.null > 0.0:
        runs["per pair"] = naive(case, nulls=False)
        runs["equal active"] = ours(case, case.equal_active)
    return runs


@torch.no_grad()
def measure_scaling(points: Mapping[str, Point], mesh: Mesh, effort: Effort, *, by: str, planned: bool) -> dict[str, Any]:
    """Measures the cost of dispatch and combine per sent row, at points that differ in the field named `by`.

    All points are timed in the same rounds. With `planned`, the timing does not include the making of the plan.
    """
    cases = {label: make_case(point, mesh, seed=effort.seed) for label, point in points.items()}
    runs = {label: at_rank(case, planned=planned) for label, case in cases.items()}
    rows = {label: count_sent(run, mesh, hidden=points[label].hidden).rows for label, run in runs.items()}
    seconds = time_interleaved(runs, mesh, effort)
    cost = {label: seconds[label] / max(1, rows[label]) for label in runs}
    first = next(iter(cost))
    sizes: Sequence[float] = [float(getattr(point, by)) for point in points.values()]
    return {
        "by": by,
        "milliseconds": {label: asdict(median_interval(each * 1e3)) for label, each in seconds.items()},
        "rows": rows,
        "nanoseconds a row": {label: asdict(median_interval(each * 1e9)) for label, each in cost.items()},
        "cost a row / the first's": {label: asdict(paired_ratio(each, cost[first])) for label, each in cost.items()},
        "log-log slope of time": log_log_slope(sizes, [float(np.median(each)) for each in seconds.values()]),
    }
