"""Routers that choose the number of experts by token, under a controller of the mean number: N ranks equal one rank. A
resumed run with these and other routers equals an uninterrupted run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import full
from tests.support.layouts import Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors
from tests.support.whole_run import whole_run

KINDS = ("top_p", "relu", "threshold", "predicted_k")
ALONE = {kind: Layout(adaptive=kind, free=True) for kind in KINDS}
ALONE["expert_threshold"] = Layout(adaptive="expert_threshold", choice="world")


def layouts() -> list[Any]:
    """Returns the layouts of each router kind. `make test` runs two kinds on two ranks; `make test-full` runs all."""
    found: list[Any] = []
    for number, (kind, alone) in enumerate(ALONE.items()):
        data = ("ddp", "fsdp2")[number % 2]
        marks = () if kind in ("relu", "expert_threshold") else pytest.mark.full
        two = replace(alone, ep=2, placement="pinned", data=data, recompute="block")
        found.append(pytest.param(kind, two, id=kind, marks=marks))
        more = replace(alone, ep=4, placement="uneven", recompute="experts")
        found.append(pytest.param(kind, more, id=f"{kind}-4", marks=pytest.mark.full))
        more = replace(alone, ep=2, edp=2, data="fsdp2", chunks=2)
        found.append(pytest.param(kind, more, id=f"{kind}-2-2", marks=pytest.mark.full))
    return found


@pytest.fixture(scope="module")
def one_rank(run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Returns, for a router kind, the outcome on one rank and the folder of its initial weights."""
    found: dict[str, tuple[Outcome, Path]] = {}

    def of(kind: str) -> tuple[Outcome, Path]:
        if kind not in found:
            start = tmp_path_factory.mktemp(kind)
            found[kind] = run_in_world(1, train, ALONE[kind], start)[0], start
        return found[kind]

    return of


@pytest.mark.parametrize(("kind", "layout"), layouts())
def test_ranks_equal_one_rank(
    run_in_world: Callable[..., list[Any]], one_rank: Callable[[str], Any], kind: str, layout: Layout
) -> None:
    expected, start = one_rank(kind)
    outcomes: list[Outcome] = run_in_world(layout.world_size, train, layout, start)
    for outcome in outcomes:
        for step, alone in zip(outcome.steps, expected.steps, strict=True):
            np.testing.assert_array_equal(step.counts.choices_LC, alone.counts.choices_LC)
            np.testing.assert_allclose(step.nll_M, alone.nll_M, rtol=1e-9)
            np.testing.assert_allclose([step.grad_norm, step.balance], [alone.grad_norm, alone.balance], rtol=1e-9)
            assert step.ledger["pairs"] == alone.ledger["pairs"]
        for name, bias in expected.biases.items():
            np.testing.assert_array_equal(outcome.biases[name], bias, err_msg=name)
        assert outcome.events == outcomes[0].events
    assert_same_tensors(outcomes, expected)
    logits = np.concatenate([outcome.logits for outcome in outcomes])
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=1e-9)
    counts = sum(step.counts.choices_LC for step in expected.steps)
    tokens = sum(step.counts.tokens_LG for step in expected.steps)
    assert (counts[:, :5].sum(1) % tokens[:, 0] != 0).all(), "the number of experts differs between tokens"
    assert layout.choice or any(bias.any() for bias in expected.biases.values())


CHANGES: dict[str, Any] = {
    "model.moe.groups": {
        "text": {"num_experts": 3, "num_null": 1, "top_k": 3, "ffn_dim": 16},
        "image": {"num_experts": 2, "num_identity": 1, "top_k": 3, "ffn_dim": 24},
    },
    "model.moe.balance": [{"kind": "active_experts", "target": {"text": 1.2}, "rate": 1.0, "proportional": 0.5}],
    "placement.policy": "interleaved",
    "parallel.ep": 1,
    "parallel.edp": 1,
    "train.micro_batch": 8,
    "train.steps": 4,
    "evaluation.every": 100,
    "evaluation.final_sequences": 4,
    "checkpoint.every": 2,
}
EXPERTS: dict[str, Any] = {
    "model.moe.groups": {name: {"num_experts": 2, "top_k": 1, "ffn_dim": 16} for name in ("text", "image")},
    "model.moe.balance": [],
    "loss.balance.schedule": [[0, 0.0]],
    "model.moe.router": {"kind": "expert_threshold", "warmup_steps": 1},
}
NULLS = {"num_experts": 4, "num_null": 2, "top_k": 3, "ffn_dim": 16}
RESUMED: dict[str, dict[str, Any]] = {
    **{kind: {"model.moe.router": {"kind": kind}} for kind in KINDS},
    "expert_threshold": EXPERTS,
    "gating_residual": {
        "model.moe.router": {"kind": "gating_residual", "selection_bias": True},
        "model.moe.groups": {"text": NULLS, "image": NULLS},
    },
    "group_limited": {
        "model.moe.router": {"kind": "group_limited", "n_group": 2},
        "model.moe.groups": {"text": NULLS, "image": NULLS},
    },
}
KEPT = ("top_p", "gating_residual")  # `make test` runs these: one has a controller's bias, one a further parameter


@pytest.mark.parametrize("kind", [kind if kind in KEPT else full(kind) for kind in RESUMED])
def test_a_resumed_run_is_the_run_that_did_not_stop(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    def run(name: str, steps: int) -> Any:
        changes = {**CHANGES, **RESUMED[kind], "run.name": name, "train.steps": steps}
        return run_in_world(1, whole_run, tiny_data, tmp_path, changes)[0]

    alone = run("alone", 4)
    run("stopped", 2)
    on = run("stopped", 4)
    assert on.begun.step == 2
    assert on.tensors.keys() == alone.tensors.keys()
    assert all(np.array_equal(value, alone.tensors[name]) for name, value in on.tensors.items())
    assert on.evaluation.loss == alone.evaluation.loss
