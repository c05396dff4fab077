"""Errors that depend on the device are raised before anything is built. Costs of dealt sequences agree with the FLOPs of
the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan.flops import forward_flops
from moe_dist.train.build.dealing import build_dealing, sequence_costs
from moe_dist.train.build.moe_layers import build_router
from moe_dist.train.build.training import check_expert_gemm, state_specs
from tests.support.messages import refused
from tests.support.tiny import tiny_config


def config(expert_gemm: str, precision: str = "bf16", **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model.moe.groups": {"text": {"num_experts": 4, "num_null": 4, "top_k": 2, "ffn_dim": 16}},
        **{"model.num_layers": 1, "parallel.ep": 1, "placement": {"policy": "interleaved"}},
        **{"parallel.expert_gemm": expert_gemm, "parallel.precision": precision},
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return tiny_config(Path("none"), Path("runs"), values)


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

    def even(**changes: Any) -> dict[str, float]:
        return config("loop", **changes).even_active

    weight = {"loss__balance__null_weight": {"text": 3.0}}
    assert even() == {}
    for kind in ("null_averaged", "null_split", "weighted"):
        assert even(**weight, loss__balance__kind=kind) == {"text": 0.5}
    controllers = [{"kind": "active_experts", "target": {"text": 1.25}, "rate": 0.1}]
    assert even(**weight, model__moe__balance=controllers) == {"text": 1.25}


def test_a_bias_is_part_of_a_checkpoint_and_has_no_moments() -> None:
    specs = state_specs(config("loop", model__moe__router={"selection_bias": True}))
    biases = [name for name in specs if name.endswith(".bias")]
    assert biases == ["layers.0.moe.router.text.bias"]
    assert "optimizer.exp_avg.layers.0.moe.router.text.true" in specs


WINDOWS = {"model.sliding_window": 5, "model.sliding_layers": [0]}
TARGET = {
    "model.moe.router.selection_bias": True,
    "model.moe.balance": [{"kind": "active_experts", "target": {"text": 0.5}, "rate": 0.1}],
}


@pytest.mark.parametrize("changes", [{}, WINDOWS, TARGET], ids=["plain", "window", "target"])
def test_the_costs_are_the_models_flops(changes: dict[str, Any]) -> None:
    config = tiny_config(Path("none"), Path("runs"), changes)
    costs = sequence_costs(config, ("image", "text"))
    taken = {"text": 0.5 if "model.moe.balance" in changes else 2 * 3 / 4, "image": 2 * 2 / 4}
    for length in (1, 2, 4, 5, 6, 31):
        parts = (
            forward_flops(config.model, seq_len=length, experts_per_token=taken, token_share=share).total * length
            for share in ({"text": 0.0, "image": 0.0}, {"text": 0.0, "image": 1.0}, {"text": 1.0, "image": 0.0})
        )
        none, image, text = parts
        assert costs.document_S[length] == pytest.approx(none, rel=1e-12)
        assert length * costs.expert_M == pytest.approx([image - none, text - none], rel=1e-9)
    assert costs.document_S[0] == 0.0


def test_sequences_change_their_micro_batch_only_without_its_terms() -> None:
    def mix(**changes: Any) -> bool:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        dealing = build_dealing(
            tiny_config(Path("none"), Path("runs"), {"rank_balance.dealing": True, **changes}), ["text"]
        )
        return dealing.mix

    off: dict[str, Any] = {"loss__balance__schedule": [[0, 0.0]]}
    alone: dict[str, Any] = {"loss__balance__scope": "micro_batch"}
    assert build_dealing(tiny_config(Path("none"), Path("runs")), ["text"]) is None
    assert mix(loss__z=1e-3)  # allowed, because loss.balance.scope=step
    assert mix(**alone, **off)
    assert not mix(**alone)
    assert not mix(**alone, loss__balance__schedule=[[0, 0.0], [9, 0.1]])
    assert not mix(**alone, **off, loss__z=1e-3)
