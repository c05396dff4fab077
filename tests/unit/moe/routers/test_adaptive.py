"""For routers that choose a number of columns for each token, a controller keeps the mean number at its target.
test_contract.py compares these routers with loops."""

from typing import Any

import pytest
import torch

from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.balance.rules import ActiveExperts
from moe_dist.placement.placement import ExpertGroup
from tests.support.cover import full_unless
from tests.unit.moe.routers.test_contract import D, made

NAMES = ("top_p", "top_p, normalised", "relu", "threshold", "predicted_k", "predicted_k, normalised")


@pytest.mark.parametrize(
    ("name", "target", "nulls"),
    full_unless(
        lambda name, target, nulls: (
            ((target, nulls) == (1.5, 0) and "normalised" not in name) or (name, nulls) == ("threshold", 4)
        ),
        [(name, target, nulls) for name in NAMES for target, nulls in ((1.5, 0), (3.0, 0), (1.0, 4))],
    ),
)
def test_a_controller_holds_the_mean_number_of_true_experts(name: str, target: float, nulls: int) -> None:
    group = ExpertGroup("all", 8, nulls, 8, 8, 0, ("text",))
    router = made(name, (group,), bias=0.0)
    rate = 20.0 if name.startswith(("relu", "predicted_k")) else 2.0  # relu's and predicted_k's biases are logits
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
