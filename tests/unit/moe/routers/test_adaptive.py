"""Routers that choose the number of columns by token: a controller holds their budget, and cases by hand. test_contract.py
compares them with their loops."""

from typing import Any

import pytest
import torch

from moe_dist.moe.balance.active_experts import ActiveExperts
from moe_dist.moe.balance.controller import BiasController
from moe_dist.placement.placement import ExpertGroup
from tests.support.cover import full_unless
from tests.unit.moe.routers.test_contract import D, made, weights_of

NAMES = ("top_p", "top_p, normalised", "relu", "threshold", "predicted_k", "predicted_k, normalised")


@pytest.mark.parametrize(
    ("name", "target", "nulls"),
    full_unless(
        lambda name, target, nulls: (target, nulls) == (1.5, 0) or (name, nulls) == ("threshold", 4),
        [(name, target, nulls) for name in NAMES for target, nulls in ((1.5, 0), (3.0, 0), (1.0, 4))],
    ),
)
def test_a_controller_holds_the_mean_number_of_true_experts(name: str, target: float, nulls: int) -> None:
    group = ExpertGroup("all", 8, nulls, 8, 8, 0, ("text",))
    router = made(name, (group,), bias=0.0)
    rate = 20.0 if name.startswith(("relu", "predicted_k")) else 2.0  # these biases are logits, not probabilities
    rule = ActiveExperts({"all": target}, rate=rate, decay_steps=50, proportional=rate / 4)
    gate: Any = router.gate(group)
    gate.bias[:8] += 1.0  # starts with too many experts per token
    moved, loads = BiasController([[gate]], (group,), [rule]), []
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        h_TD = torch.randn(256, D, dtype=torch.double, generator=generator)
        with torch.no_grad():
            routed = router(h_TD, torch.zeros(256, dtype=torch.int64))
        moved.after_step(routed.counts)
        loads.append(float(routed.counts.choices_LC[0][:8].sum()) / 256)
    assert loads[0] > target + 0.3
    assert sum(loads[-100:]) / 100 == pytest.approx(target, rel=0.02)


def test_the_output_is_continuous_where_a_choice_changes() -> None:
    """With ReLU and predicted k, a small input step that changes the number of experts changes the weights only a
    little."""
    for name in ("relu", "predicted_k"):
        router = made(name, (ExpertGroup("all", 8, 0, 8, 8, 0, ("text",)),), bias=0.0)
        line = torch.linspace(0, 1, 4001, dtype=torch.double)[:, None]
        ends = torch.randn(2, D, dtype=torch.double, generator=torch.Generator().manual_seed(5))
        inputs = ends[0] + line * (ends[1] - ends[0])
        routing = router(inputs, torch.zeros(4001, dtype=torch.int64))
        table = weights_of(router, routing, 4001).detach()
        changes = ((table[1:] > 0) != (table[:-1] > 0)).any(1)
        assert changes.any()
        if name == "relu":
            assert float((table[1:] - table[:-1]).abs().max()) < 5e-3
        else:  # only the sum of weights is continuous, because two experts swap places at equal probabilities
            assert float((table.sum(1)[1:] - table.sum(1)[:-1]).abs().max()) < 5e-3
