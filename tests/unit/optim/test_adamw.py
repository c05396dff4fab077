import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.errors import ConfigError
from moe_dist.optim.optimizer import make_optimizer, materialise_moments, set_step_count, step_count
from tests.support.messages import refused

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


class FakeFusedAdam:
    """Stands in for Apex's FusedAdam: keeps its arguments, and counts steps per group."""

    def __init__(self, groups: Any, **settings: Any) -> None:
        self.param_groups = [dict(group) for group in groups]
        self.settings = settings
        self.state: dict[Any, dict[str, Any]] = defaultdict(dict)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FakeFusedAdam  # type: ignore[attr-defined]
    package.optimizers = optimizers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    return optimizers


def on_cuda() -> Any:
    return SimpleNamespace(device=torch.device("cuda"))


def test_torch_is_fused_and_follows_the_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_optimizer([{"params": [parameter], "weight_decay": 0.5}], backend="torch", **SETTINGS)
    assert optimizer.defaults["fused"]
    expected, first, second = parameter.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(1, 4):
        parameter.grad = torch.tensor([0.5, -1.5], dtype=torch.float64) * step
        first = 0.9 * first + 0.1 * parameter.grad
        second = 0.95 * second + 0.05 * parameter.grad**2
        expected = expected * (1 - 0.1 * 0.5)
        expected = expected - 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)
    assert step_count(optimizer) == 3


def test_auto_takes_apex_for_cuda_parameters(apex: ModuleType) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.1}]
    assert isinstance(make_optimizer(groups, backend="auto", **SETTINGS), torch.optim.AdamW)
    made: Any = make_optimizer([{"params": [on_cuda()]}], backend="auto", **SETTINGS)
    assert isinstance(made, FakeFusedAdam)
    assert made.settings == {**SETTINGS, "weight_decay": 0.0, "adam_w_mode": True}


def test_apex_counts_steps_by_group(apex: ModuleType) -> None:
    optimizer: Any = FakeFusedAdam([{"params": [nn.Parameter(torch.ones(2))]}, {"params": []}])
    materialise_moments(optimizer)
    (state,) = optimizer.state.values()
    assert set(state) == {"exp_avg", "exp_avg_sq"}
    assert step_count(optimizer) == 0
    set_step_count(optimizer, 7)
    assert [group["step"] for group in optimizer.param_groups] == [7, 7]
    assert step_count(optimizer) == 7


def test_unavailable_apex_is_refused_with_a_fix(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ConfigError, "backend=apex"):
        make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], backend="apex", **SETTINGS)
    monkeypatch.delattr(apex, "FusedAdam")  # an unrelated project that is also called apex has no FusedAdam
    with refused(ConfigError, "backend=apex"):
        make_optimizer([{"params": [on_cuda()]}], backend="apex", **SETTINGS)
    assert isinstance(
        make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], backend="auto", **SETTINGS), torch.optim.AdamW
    )
