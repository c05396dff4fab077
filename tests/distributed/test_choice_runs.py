"""Tests whole runs with expert choice: thresholds that another layout loads, a second stage, and upcycling. test_resume.py
resumes such runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import full
from tests.support.whole_run import WholeRun, whole_run

CHOICE = {
    "model.moe.groups": {
        "text": {"num_experts": 3, "top_k": 1, "ffn_dim": 16},
        "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24},
    },
    "model.moe.router": {"kind": "expert_choice", "causal": "threshold", "noise": 1.0, "threshold_decay": 0.7},
    "loss.balance.schedule": [[0, 0.0]],
    "train.steps": 6,
    "evaluation.every": 100,
    "evaluation.final_sequences": 4,
    "checkpoint.every": 3,
}
AUXILIARY = {
    **CHOICE,
    "model.moe.router": {"kind": "expert_choice", "causal": "auxiliary"},
    "train.only": "auxiliary_routers",
    "optimizer.lr": 1e-2,
    "train.steps": 12,
}
ONE_RANK = {"parallel.ep": 1, "placement.policy": "interleaved"}
Run = Callable[..., list[WholeRun]]


@pytest.fixture(scope="module")
def run(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns `run(changes, ranks=2)`, which starts or continues a run in this module's folder."""
    root = tmp_path_factory.mktemp("runs")

    def started(changes: dict[str, Any], ranks: int = 2) -> list[WholeRun]:
        changes = {key: str(root / value) if key == "run.init_from" else value for key, value in changes.items()}
        return run_in_world(ranks, whole_run, tiny_data, root, changes)

    return started


@pytest.fixture(scope="module")
def first_stage(run: Run) -> list[WholeRun]:
    return run({**CHOICE, "run.name": "first"})


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(value, theirs[name]) for name, value in ours.items())


def thresholds(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if name.endswith((".threshold", ".statistics"))}


def test_a_run_is_evaluated_by_thresholds_and_tells_what_the_choice_of_training_is_worth(
    first_stage: list[WholeRun],
) -> None:
    for outcome in first_stage:
        evaluation = outcome.evaluation
        assert evaluation == first_stage[0].evaluation
        assert evaluation.choice_loss.keys() == evaluation.loss.keys() >= {"text", "image"}
        assert all(np.isfinite(value) for value in [*evaluation.loss.values(), *evaluation.choice_loss.values()])
        assert evaluation.choice_loss != evaluation.loss
        assert set(evaluation.experts_per_token) == {"text", "image"}
        for group, taken in evaluation.choice_experts_per_token.items():
            assert 1.0 <= taken < 1.1, group  # each of n experts takes ceil(T / n) of T tokens
    named = thresholds(first_stage[0].tensors)
    assert len(named) == 2 * 2 * 2  # two tensors of an auxiliary router for each of two layers and two groups
    assert all((value[..., :] > 0).all() for name, value in named.items() if name.endswith("threshold"))
    assert all((value[1] == 6).all() for name, value in named.items() if name.endswith("statistics"))
    assert not any(thresholds(first_stage[0].at_start)[name].any() for name in named)
    assert same(named, thresholds(first_stage[1].tensors))


def test_thresholds_go_on_on_another_layout(run: Run) -> None:
    before = run({**CHOICE, "run.name": "moved", "train.steps": 3})
    (elsewhere,) = run({**CHOICE, **ONE_RANK, "run.name": "moved", "train.steps": 4}, 1)
    assert elsewhere.begun.step == 3
    assert same(thresholds(elsewhere.at_start), thresholds(before[0].tensors))
    assert not same(thresholds(elsewhere.tensors), thresholds(elsewhere.at_start))


@pytest.mark.parametrize("data", [full("ddp"), full("fsdp2")])
def test_the_second_stage_trains_auxiliary_routers_alone(run: Run, first_stage: list[WholeRun], data: str) -> None:
    second = {**AUXILIARY, "run.name": f"second-{data}", "run.init_from": "first", "parallel.data": data}
    outcomes = run({**second, "train.steps": 6, "parallel.recompute": "block"})
    outcomes = run({**second, "parallel.recompute": "block"})  # resumes the second stage
    assert outcomes[0].begun.step == 6
    for outcome, before in zip(outcomes, first_stage, strict=True):
        auxiliary = {name for name in outcome.tensors if ".auxiliary." in name}
        assert len(auxiliary) == 2 * 2 * 2
        assert outcome.trained == auxiliary, "no moments for what is frozen"
        frozen = {name: value for name, value in outcome.tensors.items() if name not in auxiliary}
        assert same(frozen, before.tensors), "not a bit of what is frozen has moved, thresholds included"
        assert all(not np.array_equal(outcome.tensors[name], outcome.at_start[name]) for name in auxiliary)
        assert outcome.steps[-1].auxiliary < outcome.steps[0].auxiliary
        assert outcome.evaluation.loss != before.evaluation.loss
        # The second stage keeps the first stage's weights, so both stages have equal losses with choice as in training.
        for name, loss in before.evaluation.choice_loss.items():
            assert outcome.evaluation.choice_loss[name] == pytest.approx(loss, rel=1e-6)


@pytest.mark.full  # two whole runs
def test_the_second_stage_leaves_thresholds_of_depths_alone(run: Run) -> None:
    mixture_of_depths = {"model.mixture_of_depths": {"capacity": 0.5, "scope": "rank", "causal": "threshold"}}
    router = {"kind": "expert_choice", "causal": "threshold"}
    before = run(
        {**CHOICE, **mixture_of_depths, "run.name": "deep", "model.moe.router": router, "evaluation.calibration": 0}
    )
    after = run(
        {**AUXILIARY, **mixture_of_depths, "run.name": "deep-second", "run.init_from": "deep", "evaluation.calibration": 0}
    )
    for first, second in zip(before, after, strict=True):
        named = {name: value for name, value in first.tensors.items() if ".depths." in name}
        assert {"layers.0.depths.threshold", "layers.0.depths.mean"} <= named.keys()
        assert same(named, {name: second.tensors[name] for name in named})


def test_a_second_stage_by_other_scores_is_refused(run: Run, first_stage: list[WholeRun]) -> None:
    assert first_stage, "it has sigmoid scores"
    router = {"kind": "expert_choice", "causal": "auxiliary", "score": "softmax"}
    with pytest.raises(Exception, match="score=softmax, the checkpoint's is sigmoid; set model"):
        run({**AUXILIARY, "run.name": "other", "run.init_from": "first", "model.moe.router": router})


@pytest.mark.full  # three whole runs; test_starting_weights.py compares the weights
def test_one_expert_a_group_becomes_several_and_the_data_go_on(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Upcycling as in MoMa copies the experts, initialises the router, adds Gumbel noise and restarts the schedule, but
    keeps the position in the data."""
    ones = {
        "text": {"num_experts": 1, "top_k": 1, "ffn_dim": 16},
        "image": {"num_experts": 1, "top_k": 1, "ffn_dim": 24},
    }
    seed = {**CHOICE, **ONE_RANK, "run.name": "seed", "model.moe.groups": ones, "train.steps": 3}
    (begun,) = run(seed, 1)
    assert (begun.ended.step, begun.ended.position) == (3, 24)
    grown = {
        **CHOICE, "run.name": "grown", "run.init_from": "seed", "run.init_rules": ["upcycle"], "run.keep_position": True,
    }  # fmt: skip
    outcomes = run({**grown, "train.steps": 2})
    for outcome in outcomes:
        assert (outcome.begun.step, outcome.begun.position, outcome.begun.first_position) == (0, 24, 24)
        for name, value in outcome.at_start.items():
            if ".experts." in name:
                layer, _, rest = name.partition(".experts.")
                group, _, tensor = rest.split(".")
                np.testing.assert_array_equal(value, begun.tensors[f"{layer}.experts.{group}.0.{tensor}"])
        rows = outcome.at_start["layers.0.moe.router.text.true"]
        assert rows.shape[0] == 3
        assert not np.array_equal(rows[0], rows[1])
        assert not np.array_equal(rows[0], begun.tensors["layers.0.moe.router.text.true"][0])
        assert np.array_equal(outcome.at_start["embedding.weight"], begun.tensors["embedding.weight"])
    # Router and noise gave different tokens to two copies of one expert, so their weights differ after training.
    assert not np.array_equal(
        outcomes[0].tensors["layers.0.moe.experts.text.0.gate"], outcomes[0].tensors["layers.0.moe.experts.text.1.gate"]
    )
    resumed = run(grown)
    assert [(each.begun.step, each.begun.position, each.ended.position) for each in resumed] == [(2, 40, 72)] * 2
