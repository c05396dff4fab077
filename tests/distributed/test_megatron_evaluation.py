"""What a run of Megatron-Core's engine shows at its end is what this project's own engine shows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from moe_dist.formats.manifest import load_manifest

from moe_dist.monitor.costs import Cost, cost_table
from moe_dist.monitor.statistics import ComputeMap, EvaluationResult
from moe_dist.plan.preflight import check
from moe_dist.train.build.training import build_evaluator
from moe_dist.train.evaluation.balance import even_routing
from moe_dist.train.evaluation.heldout import heldout_losses
from moe_dist.train.rank_balance.placement_rows import build_placement_rows
from tests.support.cover import full
from tests.support.engine_run import config_of, megatron, started_run, step_results
from tests.support.worlds import RankContext

ALL = {
    "train.steps": 2,
    "evaluation.ablate_experts": True,
    "evaluation.final_sequences": 4,
    "monitor.cost_table": True,
    "monitor.compute_map": {"sequences": 4, "pictures": 3, "lines": 3},
}


class Shown(NamedTuple):
    evaluation: EvaluationResult
    costs: list[Cost]
    even: Mapping[str, float]  # held-out losses with evenly spread pairs, as balance efficiency times them


def shown(rank: RankContext, data: str, changes: Mapping[str, Any]) -> Shown:
    """Two steps, then the last evaluation and the cost table."""
    changes = {**ALL, **changes}
    with started_run(rank, data, changes) as run:
        plan, mesh = check(config_of(data, rank.folder, changes), world_size=rank.world_size), run.mesh
        rows = build_placement_rows(run.config, plan, mesh, last=2)
        assert rows is not None
        results = step_results(run, 0, 2, [rows])
        counted = rows.total(mesh.world, mesh.tracker)
        costs = cost_table(
            [each.ledger for each in results],
            run.placement,
            run.config.placement.policy,
            counted,
            tokens=sum(each.tokens for each in results) / 2,
            seconds="not timed",
            untimed="in a test",
        ).costs
        evaluator = build_evaluator(run.config, load_manifest(data), run.training, run.placement)
        evaluation = evaluator(2, final=True)
        with even_routing(evaluator.model, run.placement.groups):
            even = heldout_losses(
                evaluator.model, evaluator._batches(4), modalities=run.plan.modalities, world=mesh.world,
                group_of_modality=evaluator.group_of_modality, counts_tokens=evaluator.counts_tokens,
            )  # fmt: skip
        return Shown(evaluation, list(costs), even.loss)


def same_map(theirs: ComputeMap | None, ours: ComputeMap | None) -> None:
    assert theirs is not None
    assert ours is not None
    assert theirs.mean == pytest.approx(ours.mean, rel=1e-12)
    assert theirs.lines == ours.lines
    assert len(theirs.pictures) == len(ours.pictures) == 3
    for one, other in zip(theirs.pictures, ours.pictures, strict=True):
        np.testing.assert_array_equal(one.experts, other.experts)
        np.testing.assert_array_equal(one.empty, other.empty)


@pytest.mark.parametrize(
    ("world_size", "own", "layout"),
    [
        full(4, {"parallel.ep": 1}, {"parallel.ep": 2, "parallel.edp": 2, **megatron(tp=2, pp=2)}),
        full(2, {"parallel.ep": 1}, {"parallel.ep": 2, **megatron(cp=2)}),
        (2, {"parallel.ep": 2}, {"parallel.ep": 2, **megatron()}),
    ],
    ids=["tp2-pp2", "cp2", "ep2"],
)
def test_the_end_of_a_run_shows_what_the_own_engine_shows(
    run_with_megatron: Callable[..., list[Any]],
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    world_size: int,
    own: dict[str, int],
    layout: dict[str, Any],
) -> None:
    expected = run_in_world(own["parallel.ep"], shown, str(tiny_data), own)[0]
    found = run_with_megatron(world_size, shown, str(tiny_data), layout)
    for evaluation, costs, even in found:
        ours = expected.evaluation
        assert evaluation.tokens == ours.tokens
        for name in ours.loss:
            assert evaluation.loss[name] == pytest.approx(ours.loss[name], rel=1e-5)
            assert evaluation.ablated_loss[name] == pytest.approx(ours.ablated_loss[name], rel=1e-5)
            assert abs(ours.ablated_loss[name] / ours.loss[name] - 1) > 1e-3
            assert abs(even[name] / ours.loss[name] - 1) > 1e-3, "the routers stayed"
        assert evaluation.experts_per_token == pytest.approx(ours.experts_per_token, rel=1e-12)
        others = [cost.method for cost in costs if "if experts were" in cost.method]
        assert len(others) == 1, "the rows counted for the run's own placement are not those that were sent"
        if own["parallel.ep"] > 1:
            assert evaluation.balance_efficiency_by_count == pytest.approx(ours.balance_efficiency_by_count)
            assert costs == expected.costs
    same_map(found[0].evaluation.compute_map, expected.evaluation.compute_map)
    assert [each.evaluation.compute_map for each in found[1:]] == [None] * (world_size - 1)
