"""N ranks equal one rank for shortcuts with latent attention (LongCat-Flash), sinks with clamped experts (gpt-oss), and
gating residuals (MoE++)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import others_full
from tests.support.layouts import Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors

LONGCAT, GPT_OSS, NULLS = "longcat_flash", "gpt_oss", "clamped experts, nulls"
RESIDUAL = "gating_residual"
LAYOUTS = [
    Layout(2, 2, "interleaved", "fsdp2", "block", form=LONGCAT, free=True),
    Layout(4, 1, "uneven", "ddp", "experts", form=LONGCAT, free=True),
    Layout(2, 1, "pinned", "fsdp2", "none", form=LONGCAT, free=True),
    Layout(2, 2, "pinned", "ddp", "block", form=LONGCAT, free=True),
    Layout(2, 2, "interleaved", "fsdp2", "block", form=GPT_OSS),
    Layout(4, 1, "uneven", "ddp", "experts", form=GPT_OSS),
    Layout(1, 2, "interleaved", "fsdp2", "experts", form=GPT_OSS),
    Layout(2, 2, "pinned", "ddp", "block", form=GPT_OSS),
    Layout(2, 2, "interleaved", "fsdp2", "none", form=NULLS, pair_budget=5),
    Layout(2, 1, "pinned", "ddp", "block", form=RESIDUAL, free=True),
    Layout(4, 1, "uneven", "fsdp2", "block", form=RESIDUAL, free=True),
    Layout(2, 2, "pinned", "fsdp2", "experts", form=RESIDUAL),
    Layout(2, 2, "interleaved", "ddp", "none", form=RESIDUAL),
]
# One parameter of each part that is particular to the family.
PARTS = {
    LONGCAT: {
        "layers.2.attention.kv_up.weight",
        "layers.2.moe.shared.down.weight",
        "layers.3.ffn.down.weight",
        "layers.0.moe.free.text.gate",
    },
    GPT_OSS: {"layers.1.attention.sinks", "layers.1.moe.router.text.offset", "layers.0.moe.experts.text.0.down_bias"},
    NULLS: {"layers.1.attention.sinks", "layers.0.moe.experts.image.0.gate_bias"},
    RESIDUAL: {f"layers.{layer}.moe.router.{group}.residual" for layer in (1, 2) for group in ("text", "image")},
}


@pytest.mark.parametrize("layout", others_full(LAYOUTS, keep=2), ids=str)
def test_ranks_equal_one_rank(run_in_world: Callable[..., list[Any]], tmp_path: Path, layout: Layout) -> None:
    oracle: Outcome = run_in_world(1, train, Layout(form=layout.form, free=layout.free), tmp_path)[0]
    outcomes = run_in_world(layout.world_size, train, layout, tmp_path)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, oracle.steps, strict=True):
            np.testing.assert_array_equal(step.counts.choices_LC, expected.counts.choices_LC)
            np.testing.assert_allclose(
                [step.grad_norm, step.balance, step.z, *step.nll_M],
                [expected.grad_norm, expected.balance, expected.z, *expected.nll_M],
                rtol=1e-9,
            )
        assert outcome.events == outcomes[0].events
    assert_same_tensors(outcomes, oracle)
    np.testing.assert_allclose(np.concatenate([each.logits for each in outcomes]), oracle.logits, rtol=0, atol=1e-9)
    moved = {name for name, gradient in oracle.gradients.items() if gradient.any()}
    assert moved >= PARTS[layout.form or ""]
