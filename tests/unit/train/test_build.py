"""Errors that depend on the device are raised before anything is built."""

import json
from typing import Any

import pytest
import torch

from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.placement.placement import ExpertGroup
from moe_dist.train.build.routing import build_router
from moe_dist.train.build.training import check_expert_gemm, state_specs
from tests.support.messages import refused


def config(expert_gemm: str, precision: str = "bf16") -> Config:
    values: dict[str, Any] = {
        "run": {"name": "build"},
        "model": {
            "hidden_dim": 32,
            "num_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "vocab_size": 48,
            "max_seq_len": 16,
            "moe": {"groups": {"text": {"num_experts": 4, "top_k": 2, "ffn_dim": 16}}},
        },
        "data": {"path": "none", "seq_len": 16},
        "train": {"steps": 1, "global_batch": 4, "micro_batch": 4},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 1},
        "parallel": {"expert_gemm": expert_gemm, "precision": precision},
    }
    return Config.model_validate_json(json.dumps(values))


class Careless(torch.nn.Module):
    """A router that ignores the capacity."""

    def __init__(self, context: RouterContext, **_: Any) -> None:
        super().__init__()


def test_a_router_that_ignores_the_capacity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopKRouterSection, "builds", f"{__name__}:Careless")
    model, group = config("auto").model, ExpertGroup("text", 4, 0, 2, 16, 0, ("text",))
    assert isinstance(build_router(model, RouterContext(32, (group,)), layer=0), Careless)
    with refused(ConfigError, "model.moe.capacity", "drops no pair", golden=False):
        build_router(model, RouterContext(32, (group,), capacity=Capacity(0.25)), layer=0)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "bf16"), ((9, 0), "fp32")])
def test_a_device_without_the_grouped_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    with refused(ConfigError, "expert_gemm=grouped"):
        check_expert_gemm(config("grouped", precision), torch.device("cuda"))
    check_expert_gemm(config("auto", precision), torch.device("cuda"))


def test_a_plan_knows_the_loads_that_it_leads_to() -> None:
    """With 4 true and 4 null experts and k = 2, an even load is 1 true expert per token. With a null weight of 3 it is 2 x
    4 / (4 + 3 x 4), and with a controller it is the controller's target."""
    values = config("loop").model_dump(mode="json")
    values["model"]["moe"]["groups"]["text"]["num_null"] = 4

    def even(**balance: Any) -> dict[str, float]:
        return Config.model_validate_json(json.dumps({**values, **balance})).even_active

    assert even() == {}
    assert even(loss={"balance": {"null_weight": {"text": 3.0}}}) == {"text": 0.5}
    for kind in ("null_split", "weighted"):
        assert even(loss={"balance": {"kind": kind, "null_weight": {"text": 3.0}}}) == {"text": 0.5}
    values["model"]["moe"]["balance"] = [{"kind": "active_experts", "target": {"text": 1.25}, "rate": 0.1}]
    assert even(loss={"balance": {"null_weight": {"text": 3.0}}}) == {"text": 1.25}


def test_a_bias_is_part_of_a_checkpoint_and_has_no_moments() -> None:
    values = config("loop").model_dump(mode="json")
    values["model"]["moe"]["router"]["selection_bias"] = True
    specs = state_specs(Config.model_validate_json(json.dumps(values)))
    biases = [name for name in specs if name.endswith(".bias")]
    assert biases == ["layers.0.moe.router.text.bias"]
    assert "optimizer.exp_avg.layers.0.moe.router.text.true" in specs
