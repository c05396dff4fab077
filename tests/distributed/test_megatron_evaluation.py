"""Expert choice and the evaluation at the end of a run give the same results in the engine of Megatron-Core as in our own
engine."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from torch import Tensor

from moe_dist.formats.manifest import load_manifest
from moe_dist.moe.routers import selection
from moe_dist.moe.routers.selection import choose
from moe_dist.moe.routing.types import ExpertsChoice
from moe_dist.monitor.costs import Cost, cost_table
from moe_dist.monitor.statistics import ComputeMap, EvaluationResult
from moe_dist.plan.preflight import check
from moe_dist.train.evaluation import evaluator as evaluator_file
from moe_dist.train.evaluation.balance import even_routing
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.evaluation.heldout import heldout_losses
from moe_dist.train.rank_balance.placement_rows import build_placement_rows
from tests.support.cover import exhaustive, full
from tests.support.engine_run import config_of, megatron, ranks, started_run, step_results, take_steps
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron
Run = Callable[..., list[Any]]
ROUTER = "model.moe.router"
CHOOSING: Mapping[str, Any] = {
    "loss.balance.schedule": [[0, 0.0]],
    "loss.z": 0.0,
    "evaluation.final_sequences": 4,
    **{f"model.moe.groups.{name}.num_null": 0 for name in ("text", "image")},
}
THRESHOLD = {"kind": "expert_threshold", "warmup_steps": 3, "threshold_decay": 0.8}
CHOICE = {"kind": "expert_choice", "causal": "threshold", "noise": 0.5}
LATE = {"model.moe.first": 3}  # the first of two pipeline stages has no experts
ALL = {
    "train.steps": 2,
    "evaluation.ablate_experts": True,
    "evaluation.final_sequences": 4,
    "monitor.cost_table": True,
    "monitor.compute_map": {"sequences": 4, "pictures": 3, "lines": 3},
}


def choose_by_rounded(logits_UE: Tensor, noisy_UE: Tensor, *rest: Any, **options: Any) -> ExpertsChoice:
    """Tokens with equal inputs, such as first tokens of documents, have scores that differ only by rounding. Scores
    rounded to 1/64 tie instead, so that the earlier token wins in both engines."""
    return choose(logits_UE, (noisy_UE * 64).round() / 64, *rest, **options)


def chosen(rank: RankContext, data: str, changes: Mapping[str, Any]) -> tuple[list[dict[str, Any]], EvaluationResult]:
    """Takes all steps. Returns them and the final evaluation, which uses calibrated thresholds. Thresholds are rounded to
    multiples of 1/256, because exact ones could separate tokens with equal inputs."""
    by_rounded = mock.patch.object(selection, "choose", choose_by_rounded)
    coarse = mock.patch.object(evaluator_file, "HALVINGS", 8)
    with by_rounded, coarse, started_run(rank, data, {**CHOOSING, **changes}) as run:
        steps = take_steps(run, 0, run.config.train.steps)
        groups = run.training.step.group_of_modality
        evaluator = Evaluator(run.config, load_manifest(data), run.training.parallel, run.placement, groups)
        return steps, evaluator(len(steps), final=True, trained=run.loader.batches(0))


@pytest.mark.parametrize(
    ("readers", "router", "layout"),
    [
        full(1, {**CHOICE, "scope": "rank"}, {**ranks(2, 2), **megatron(tp=2, pp=2)}),
        full(2, {**THRESHOLD, "scope": "world"}, {**ranks(2), **megatron()}),
        exhaustive(2, {**CHOICE, "scope": "world"}, {**ranks(4), **megatron(cp=2)}),
        exhaustive(2, {**THRESHOLD, "scope": "world"}, {**ranks(2, 2), **megatron(tp=2)}),
        exhaustive(1, {**CHOICE, "scope": "rank"}, {**ranks(1, 2), **LATE, **megatron(pp=2)}),
        exhaustive(2, {**CHOICE, "scope": "ep_group"}, {**ranks(2), **megatron()}),
    ],
    ids=["tp2-pp2", "ep2", "ep4-cp2", "tp2-dp2", "late", "ep_group"],
)
def test_experts_choose_what_they_choose_in_the_own_engine(
    run_engine: Run, readers: int, router: dict[str, Any], layout: dict[str, Any]
) -> None:
    """`readers` is the number of ranks of our engine. Each of these ranks reads whole micro-batches."""
    first = {key: layout[key] for key in LATE if key in layout}
    steps, ours = run_engine({**first, ROUTER: router, **ranks(readers)}, chosen)[0]
    assert len({step["choices"].tobytes() for step in steps}) > 1
    for found, evaluation in run_engine({**layout, ROUTER: router}, chosen):
        for number, (theirs, step) in enumerate(zip(found, steps, strict=True)):
            assert (theirs["choices"] == step["choices"]).all(), f"step {number}"
            assert theirs["loss"] == pytest.approx(step["loss"], rel=1e-5), f"step {number}"
            assert theirs["norm"] == pytest.approx(step["norm"], rel=1e-4), f"step {number}"
        assert evaluation.loss == pytest.approx(ours.loss, rel=1e-5)
        assert evaluation.choice_loss == pytest.approx(ours.choice_loss, rel=1e-5)
        assert evaluation.experts_per_token == pytest.approx(ours.experts_per_token, rel=1e-12)
        assert evaluation.choice_experts_per_token == pytest.approx(ours.choice_experts_per_token, rel=1e-12)
        assert set(ours.choice_loss) == set(ours.loss)


class Shown(NamedTuple):
    evaluation: EvaluationResult
    costs: list[Cost]
    even: Mapping[str, float]  # held-out losses if pairs were spread evenly: balance efficiency times the loss


def shown(rank: RankContext, data: str, changes: Mapping[str, Any]) -> Shown:
    """Takes two steps, evaluates for the last time, and builds the cost table."""
    changes = {**ALL, **changes}
    with started_run(rank, data, changes) as run:
        plan, mesh = check(config_of(data, rank.folder, changes), world_size=rank.world_size), run.mesh
        rows = build_placement_rows(run.config, plan, mesh, last=2)
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
        groups = run.training.step.group_of_modality
        evaluator = Evaluator(run.config, load_manifest(data), run.training.parallel, run.placement, groups)
        evaluation = evaluator(2, final=True)
        with even_routing(evaluator.model, run.placement.groups):
            even = heldout_losses(
                evaluator.model, evaluator.batches(4), modalities=run.plan.modalities, world=mesh.world,
                group_of_modality=evaluator.group_of_modality, counts_tokens=run.training.parallel.counts_tokens,
            )  # fmt: skip
        return Shown(evaluation, list(costs), even.loss)


def same_map(theirs: ComputeMap | None, ours: ComputeMap | None) -> None:
    assert theirs.mean == pytest.approx(ours.mean, rel=1e-12)
    assert theirs.lines == ours.lines
    assert len(theirs.pictures) == len(ours.pictures) == 3
    for one, other in zip(theirs.pictures, ours.pictures, strict=True):
        np.testing.assert_array_equal(one.experts, other.experts)
        np.testing.assert_array_equal(one.empty, other.empty)


@pytest.mark.parametrize(
    ("own_ep", "layout"),
    [
        (2, {**ranks(2), **megatron()}),
        full(1, {**ranks(2, 2), **megatron(tp=2, pp=2)}),
        exhaustive(1, {**ranks(2), **megatron(cp=2)}),
    ],
    ids=["ep2", "tp2-pp2", "cp2"],
)
def test_the_end_of_a_run_shows_what_the_own_engine_shows(run_engine: Run, own_ep: int, layout: dict[str, Any]) -> None:
    expected = run_engine(ranks(own_ep), shown)[0]
    ours, found = expected.evaluation, run_engine(layout, shown)
    for evaluation, costs, even in found:
        assert evaluation.tokens == ours.tokens
        for name in ours.loss:
            assert evaluation.loss[name] == pytest.approx(ours.loss[name], rel=1e-5)
            assert evaluation.ablated_loss[name] == pytest.approx(ours.ablated_loss[name], rel=1e-5)
            assert abs(ours.ablated_loss[name] / ours.loss[name] - 1) > 1e-3
            assert abs(even[name] / ours.loss[name] - 1) > 1e-3, "the routers stayed"
        assert evaluation.experts_per_token == pytest.approx(ours.experts_per_token, rel=1e-12)
        others = [cost.method for cost in costs if "if experts were" in cost.method]
        assert len(others) == 1, "the rows counted for the run's own placement are not those that were sent"
        if own_ep > 1:
            assert evaluation.balance_efficiency_by_count == pytest.approx(ours.balance_efficiency_by_count)
            assert costs == expected.costs
    same_map(found[0].evaluation.compute_map, ours.compute_map)
    assert [each.evaluation.compute_map for each in found[1:]] == [None] * (len(found) - 1)
