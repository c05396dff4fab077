"""Mixture of depths on N ranks equals one process that selects over the same selection scopes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.comm.names import DEPTH_SCORES
from tests.support.cover import others_full
from tests.support.layouts import MICRO_BATCHES, STEPS, Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors

LAYOUTS = [
    Layout(2, 1, "interleaved", mixture_of_depths="rank"),
    Layout(2, 1, "pinned", "ddp", "block", mixture_of_depths="world", depth_causal="auxiliary"),
    Layout(4, 1, "uneven", "ddp", "experts", mixture_of_depths="rank", depth_causal="auxiliary"),
    Layout(4, 1, "pinned", "fsdp2", "block", mixture_of_depths="world"),
    Layout(2, 2, "pinned", "fsdp2", mixture_of_depths="ep_group", depth_causal="auxiliary"),
    Layout(4, 1, "uneven", overlap=True, chunks=2, mixture_of_depths="ep_group"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder for the checkpoints with the initial weights, one for each causal method."""
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def oracle_of(run_in_world: Callable[..., list[Any]], start: Path) -> Callable[[str, int], Outcome]:
    """Returns `oracle_of(causal, parts)`: the outcome of one process whose tokens are split into `parts` selection
    scopes."""
    known: dict[tuple[str, int], Outcome] = {}

    def oracle(causal: str, parts: int) -> Outcome:
        if (causal, parts) not in known:
            layout = Layout(mixture_of_depths="world", depth_causal=causal, depth_parts=parts)
            known[causal, parts] = run_in_world(1, train, layout, start / causal)[0]
        return known[causal, parts]

    return oracle


def parts_of(layout: Layout) -> int:
    return {"rank": layout.world_size, "ep_group": layout.edp, "world": 1}[layout.mixture_of_depths or "world"]


@pytest.mark.parametrize("layout", others_full(LAYOUTS, keep=2), ids=str)
def test_layout_equals_one_process_over_the_same_sets(
    run_in_world: Callable[..., list[Any]], start: Path, oracle_of: Callable[[str, int], Outcome], layout: Layout
) -> None:
    oracle = oracle_of(layout.depth_causal, parts_of(layout))
    outcomes = run_in_world(layout.world_size, train, layout, start / layout.depth_causal)
    first = oracle.steps[0].mixture_of_depths
    assert first is not None
    assert (first.layers, first.token_share, first.groups) == ((0,), 0.3, ("text", "image"))
    # the number of selected tokens is rounded up in each scope
    assert 0.29 < first.taken_LG.sum() / first.tokens_LG.sum() < 0.4
    np.testing.assert_array_equal(oracle.steps[0].counts.tokens_LG, [first.taken_LG[0], first.tokens_LG[0]])
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, oracle.steps, strict=True):
            for counted in ("tokens_LG", "taken_LG", "agreed_L"):
                np.testing.assert_array_equal(
                    getattr(step.mixture_of_depths, counted), getattr(expected.mixture_of_depths, counted)
                )
            np.testing.assert_allclose(step.mixture_of_depths.weight_L, expected.mixture_of_depths.weight_L, rtol=1e-9)
            np.testing.assert_array_equal(step.counts.choices_LC, expected.counts.choices_LC)
            np.testing.assert_array_equal(step.counts.tokens_LG, expected.counts.tokens_LG)
            np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-9)
            np.testing.assert_allclose(
                [step.grad_norm, step.balance, step.z], [expected.grad_norm, expected.balance, expected.z], rtol=1e-9
            )
        scores = 0 if layout.mixture_of_depths == "rank" else STEPS * MICRO_BATCHES + 1
        assert outcome.events.count(DEPTH_SCORES) == scores
        assert outcome.events == outcomes[0].events, "the recorded order of collectives differs between ranks"
    assert_same_tensors(outcomes, oracle)
    mixture_of_depths = {name for name in oracle.parameters if ".depths." in name}
    last = "threshold" if layout.depth_causal == "threshold" else "auxiliary.outer"
    assert {"layers.0.depths.router", f"layers.0.depths.{last}"} <= mixture_of_depths
    assert all(np.abs(oracle.gradients[name]).max() > 0 for name in mixture_of_depths & oracle.gradients.keys())
    logits = np.concatenate([outcome.logits for outcome in outcomes])
    np.testing.assert_allclose(logits, oracle.logits, rtol=0, atol=1e-9)


def test_sets_differ_where_ranks_do(oracle_of: Callable[[str, int], Outcome]) -> None:
    """The selection over two scopes differs from the selection over all tokens, so the comparison can fail."""
    assert np.abs(oracle_of("threshold", 1).logits - oracle_of("threshold", 2).logits).max() > 1e-3
