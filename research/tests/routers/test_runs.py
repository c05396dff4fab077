"""Whole runs with the control routers draw the same numbers on any layout and after a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import full
from tests.support.tiny import tiny_config
from tests.support.whole_run import WholeRun, whole_run

SETTINGS = {
    "model.moe.groups": {
        "text": {"num_experts": 3, "top_k": 2, "ffn_dim": 16},
        "image": {"num_experts": 2, "top_k": 2, "ffn_dim": 24},
    },
    "placement.policy": "interleaved",
    "train.steps": 4,
    "evaluation.every": 100,
    "evaluation.final_sequences": 4,
    "checkpoint.every": 2,
}
BY_LAYER = {"kind": "scheduled_top_k", "active_experts": {"text": [1.5, 2.0], "image": [0.5, 1.0]}}
Run = Callable[..., list[WholeRun]]


@pytest.fixture(scope="module", params=["scheduled_top_k", "top_k_by_id"])
def run(
    request: pytest.FixtureRequest,
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Returns `run(name, ranks, ep, changes)`, which starts a run. Each step has one micro-batch over all ranks."""
    root = tmp_path_factory.mktemp("runs")
    router = BY_LAYER
    if request.param == "top_k_by_id":
        model = tiny_config(tiny_data, root, {}).model
        np.save(root / "loads.npy", np.random.default_rng(1).uniform(0, 2, (len(model.moe_layers), model.vocab_size)))
        router = {"kind": "top_k_by_id", "table": str(root / "loads.npy")}
    settings = {**SETTINGS, "model.moe.router": router}

    def started(name: str, ranks: int, ep: int, changes: dict[str, Any] | None = None) -> list[WholeRun]:
        layout = {"run.name": name, "parallel.ep": ep, "parallel.edp": ranks // ep, "train.micro_batch": 8 // ranks}
        return run_in_world(ranks, whole_run, tiny_data, root, {**settings, **layout, **(changes or {})})

    return started


@pytest.fixture(scope="module")
def alone(run: Run) -> WholeRun:
    return run("alone", 1, 1)[0]


@pytest.mark.parametrize("run", ["scheduled_top_k"], indirect=True)
def test_loads_are_what_they_should_be(alone: WholeRun) -> None:
    tokens_LG = sum(step.counts.tokens_LG for step in alone.steps)
    choices_LE = sum(step.counts.choices_LC for step in alone.steps)
    text_L, image_L = choices_LE[:, :3].sum(1) / tokens_LG[:, 0], choices_LE[:, 3:5].sum(1) / tokens_LG[:, 1]
    assert (text_L[1], image_L[1]) == (2.0, 1.0)
    for load, fraction, count in ((text_L[0] - 1, 0.5, tokens_LG[0, 0]), (image_L[0], 0.5, tokens_LG[0, 1])):
        assert abs(load - fraction) < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(("ranks", "ep"), [full(2, 2), (4, 2), full(4, 4)])
def test_ranks_equal_one_rank(run: Run, alone: WholeRun, ranks: int, ep: int) -> None:
    outcomes = run(f"ranks-{ranks}-{ep}", ranks, ep, {"parallel.recompute": "block"} if ep == 4 else {})
    for ours, theirs in zip(outcomes[0].steps, alone.steps, strict=True):
        np.testing.assert_array_equal(ours.counts.choices_LC, theirs.counts.choices_LC)
        np.testing.assert_allclose(ours.nll_M, theirs.nll_M, rtol=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    merged = {name: value for outcome in outcomes for name, value in outcome.tensors.items()}
    assert merged.keys() == alone.tensors.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(value, alone.tensors[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_a_resumed_run_draws_as_if_it_had_not_stopped(run: Run, alone: WholeRun) -> None:
    run("stopped", 1, 1, {"train.steps": 2})
    on = run("stopped", 1, 1)[0]
    assert on.begun.step == 2
    assert all(np.array_equal(value, alone.tensors[name]) for name, value in on.tensors.items())
    assert on.evaluation.loss == alone.evaluation.loss
