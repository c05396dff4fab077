"""Counts the rows that Megatron-Core's dispatcher and the other contenders send for null choices."""

from typing import Any

import pytest
import torch

from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from moe_dist.parallel.mesh import make_mesh
from research.bench.contenders import expected, make_case, naive, ours
from research.bench.measure import count_sent
from research.bench.megatron_variants import VARIANTS, megatron_dispatch
from research.bench.points import Point
from tests.support.worlds import RankContext

POINT = Point(tokens=64, hidden=16, experts=8, null=0.5)


def rows_of_variants(rank: RankContext) -> dict[str, int]:
    """Checks the result of each variant of Megatron's dispatcher, and returns the number of rows that the variant sends."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    case = make_case(POINT, mesh, seed=0)
    with megatron_on_cpu(), model_parallel(ep=rank.world_size), torch.no_grad():
        runs: dict[str, Any] = {name: megatron_dispatch(case, variant) for name, variant in VARIANTS.items()}
        runs |= {"ours": ours(case, case.taken), "per pair": naive(case, nulls=False), "naive": naive(case, nulls=True)}
        for name, run in runs.items():
            torch.testing.assert_close(run(), expected(case, case.taken), msg=lambda text, n=name: f"{n}: {text}")
        return {name: count_sent(run, mesh, hidden=POINT.hidden).rows for name, run in runs.items()}


@pytest.mark.megatron
def test_megatron_sends_no_row_for_a_null_choice_whose_column_is_cleared(run_in_world: Any) -> None:
    rows, _ = run_in_world(2, rows_of_variants)
    assert rows["ours"] < rows["megatron"] == rows["megatron, capacity"] == rows["per pair"]
    assert rows["megatron"] < 0.6 * rows["megatron, remapped"]
    assert rows["megatron, remapped"] == rows["naive"]
