"""Experts that choose tokens in Megatron-Core's engine choose those of this project's own engine, whose ranks have whole
micro-batches: in training, and by calibrated thresholds in evaluation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe_dist.config.manifest import load_manifest
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.train.build import build_evaluator
from tests.support.cover import exhaustive, full
from tests.support.engine_run import megatron, started_run, take_steps
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron

ROUTER = "model.moe.router"
CHANGES: Mapping[str, Any] = {
    "loss.balance.schedule": [[0, 0.0]],
    "loss.z": 0.0,
    "evaluation.final_sequences": 4,
    **{f"model.moe.groups.{name}.num_null": 0 for name in ("text", "image")},
}
THRESHOLD = {"kind": "expert_threshold", "warmup_steps": 3, "threshold_decay": 0.8}
CHOICE = {"kind": "expert_choice", "causal": "threshold", "noise": 0.5}
LATE = {"model.moe.first": 3}  # the first of two pipeline stages has no experts


class Outcome(NamedTuple):
    steps: list[dict[str, Any]]
    evaluation: EvaluationResult


def outcome(rank: RankContext, data: str, changes: Mapping[str, Any]) -> Outcome:
    """All steps, and the evaluation that ends the run."""
    with started_run(rank, data, {**CHANGES, **changes}) as run:
        steps = take_steps(run, 0, run.config.train.steps)
        evaluator = build_evaluator(run.config, load_manifest(data), run.training, run.placement)
        return Outcome(steps, evaluator(len(steps), final=True, trained=run.loader.batches(0)))


@pytest.mark.parametrize(
    ("world_size", "readers", "router", "layout"),
    [
        full(4, 1, {**CHOICE, "scope": "rank"}, {"parallel.ep": 2, "parallel.edp": 2, **megatron(tp=2, pp=2)}),
        full(2, 2, {**THRESHOLD, "scope": "world"}, {"parallel.ep": 2, **megatron()}),
        exhaustive(4, 2, {**CHOICE, "scope": "world"}, {"parallel.ep": 4, **megatron(cp=2)}),
        exhaustive(4, 2, {**THRESHOLD, "scope": "world"}, {"parallel.ep": 2, "parallel.edp": 2, **megatron(tp=2)}),
        exhaustive(2, 1, {**CHOICE, "scope": "rank"}, {"parallel.ep": 1, "parallel.edp": 2, **LATE, **megatron(pp=2)}),
        exhaustive(2, 2, {**CHOICE, "scope": "ep_group"}, {"parallel.ep": 2, **megatron()}),
    ],
    ids=["tp2-pp2", "ep2", "ep4-cp2", "tp2-dp2", "late", "ep_group"],
)
def test_experts_choose_what_they_choose_in_the_own_engine(
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    world_size: int,
    readers: int,
    router: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    own = {key: value for key, value in layout.items() if key in LATE}
    own |= {ROUTER: router, "parallel.ep": readers, "parallel.edp": 1}
    steps, ours = run_in_world(readers, outcome, str(tiny_data), own)[0]
    assert len({step["choices"].tobytes() for step in steps}) > 1
    for found, evaluation in run_in_world(world_size, outcome, str(tiny_data), {**layout, ROUTER: router}):
        for number, (theirs, step) in enumerate(zip(found, steps, strict=True)):
            assert (theirs["choices"] == step["choices"]).all(), f"step {number}"
            assert theirs["loss"] == pytest.approx(step["loss"], rel=1e-5), f"step {number}"
            assert theirs["norm"] == pytest.approx(step["norm"], rel=1e-4), f"step {number}"
        assert evaluation.loss == pytest.approx(ours.loss, rel=1e-5)
        assert evaluation.choice_loss == pytest.approx(ours.choice_loss, rel=1e-5)
        assert evaluation.experts_per_token == pytest.approx(ours.experts_per_token, rel=1e-12)
        assert evaluation.choice_experts_per_token == pytest.approx(ours.choice_experts_per_token, rel=1e-12)
        assert set(ours.choice_loss) == set(ours.loss)
