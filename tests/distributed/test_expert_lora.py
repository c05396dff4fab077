"""LoRA on the experts of a frozen MoE over ranks: N ranks equal one, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import others_full
from tests.support.layouts import Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors

LAYOUTS = [
    Layout(2, 2, data="fsdp2", ffn_lora="each", attention_lora=True),
    Layout(4, 1, "uneven", recompute="experts", ffn_lora="each"),  # the last rank has no expert
    Layout(4, 1, "uneven", data="fsdp2", recompute="block", ffn_lora="shared"),
    Layout(2, 1, "pinned", recompute="block", ffn_lora="each", attention_lora=True),
    Layout(1, 2, data="fsdp2", recompute="experts", ffn_lora="each"),
    Layout(2, 2, "pinned", ffn_lora="shared"),
    Layout(4, 1, "uneven", ffn_lora="shared", attention_lora=True, pair_budget=5),
    Layout(4, 2, "uneven", data="fsdp2", ffn_lora="each"),
]


@pytest.mark.parametrize("layout", others_full(LAYOUTS, pairs_of=("data", "ffn_lora")), ids=str)
def test_layout_equals_one_rank(run_in_world: Callable[..., list[Any]], tmp_path: Path, layout: Layout) -> None:
    alone = Layout(ffn_lora=layout.ffn_lora, attention_lora=layout.attention_lora)
    oracle: Outcome = run_in_world(1, train, alone, tmp_path)[0]
    outcomes = run_in_world(layout.world_size, train, layout, tmp_path)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, oracle.steps, strict=True):
            np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-9)
            np.testing.assert_allclose(step.grad_norm, expected.grad_norm, rtol=1e-9)
        assert outcome.events == outcomes[0].events
    assert_same_tensors(outcomes, oracle)
    assert all(name.endswith((".a", ".b", "_a", "_b")) for name in oracle.gradients)
    assert any("gate_up" in name and gradient.any() for name, gradient in oracle.gradients.items())
    np.testing.assert_allclose(np.concatenate([o.logits for o in outcomes]), oracle.logits, rtol=0, atol=1e-9)
