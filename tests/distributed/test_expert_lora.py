"""LoRA on the experts of a frozen MoE model, gpt-oss and DeepSeek-V3 among them: N ranks equal one rank in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import others_full, rest_full
from tests.support.layouts import Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors
from tests.support.whole_run import whole_run

LAYOUTS = [
    Layout(2, 2, data="fsdp2", ffn_lora="each", attention_lora=True),
    Layout(4, 1, "uneven", recompute="experts", ffn_lora="each"),  # the last rank has no expert
    Layout(4, 1, "uneven", data="fsdp2", recompute="block", ffn_lora="shared"),
    Layout(2, 1, "pinned", recompute="block", ffn_lora="each", attention_lora=True),
    Layout(1, 2, data="fsdp2", recompute="experts", ffn_lora="each"),
    Layout(2, 2, "pinned", ffn_lora="shared"),
    Layout(4, 1, "uneven", ffn_lora="shared", attention_lora=True, pair_budget=5),
    Layout(4, 2, "uneven", data="fsdp2", ffn_lora="each"),
    Layout(2, 2, data="fsdp2", recompute="experts", ffn_lora="each", form="gpt_oss, adapted"),
    Layout(2, 1, "pinned", ffn_lora="each", attention_lora=True, limited=True, form="deepseek_v3, adapted"),
    Layout(2, 2, data="fsdp2", recompute="block", ffn_lora="shared", limited=True, form="deepseek_v3, adapted"),
]


@pytest.mark.parametrize("layout", others_full(LAYOUTS, keep=3), ids=str)
def test_layout_equals_one_rank(run_in_world: Callable[..., list[Any]], tmp_path: Path, layout: Layout) -> None:
    alone = Layout(ffn_lora=layout.ffn_lora, attention_lora=layout.attention_lora, limited=layout.limited, form=layout.form)
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


BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes of the base, and fields of its adapted experts
    "ffn_lora": ({}, {}),
    "clamped_ffn_lora": (
        {"model.attention": {"kind": "sinks"}, "model.moe.experts": {"kind": "clamped_ffn", "limit": 0.5}},
        {"swiglu_limit": 0.5},
    ),
}


@pytest.mark.parametrize("kind", rest_full(BASES))
def test_adapters_go_on_on_other_ranks(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    """Two ranks with different experts train and save. One rank continues with the same bits on the same base."""
    base, fields = BASES[kind]
    run_in_world(2, whole_run, tiny_data, tmp_path, {**base, "run.name": "base", "train.steps": 1})
    changes = {
        **base,
        "run.name": "adapted",
        "run.init_from": str(tmp_path / "base"),
        "run.init_rules": ["adapt"],
        "model.moe.experts": {"kind": kind, "rank": 2, "alpha": 4.0, **fields},
        "train.only": "adapters",
        "parallel.data": "fsdp2",
    }
    first = run_in_world(2, whole_run, tiny_data, tmp_path, {**changes, "train.steps": 2})
    alone = {"parallel.ep": 1, "placement.policy": "interleaved", "parallel.data": "ddp"}
    (second,) = run_in_world(1, whole_run, tiny_data, tmp_path, {**changes, **alone})
    assert second.begun.step == 2
    for run in first:
        moved = {name for name, value in run.tensors.items() if not np.array_equal(run.at_start[name], value)}
        assert moved == {name for name in run.tensors if name.endswith(("_a", "_b"))} != set()
        assert all(name.endswith(("_a", "_b")) for name in run.trained), "no moments for what is frozen"
        assert run.trained
        for name, value in run.tensors.items():
            np.testing.assert_array_equal(second.at_start[name], value, err_msg=name)
