"""A group may have any name, even the name of an attribute of a module that contains the group."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.parameter_names import Role, named_parameters
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model, freeze
from tests.support.tiny import tiny_config

# Some of these names are attributes of modules that contain groups, some are parts of parameters' names, and `class` is
# a Python keyword.
NAMES = ("auxiliary", "class", "experts", "forward", "group", "null", "parameters", "router", "speech-2", "training")


def configured(names: tuple[str, str], router: dict[str, Any], **extra: int) -> dict[str, Any]:
    group = {"num_experts": 2, "top_k": 1, "ffn_dim": 4, **extra}
    return {
        "model.hidden_dim": 4,
        "model.num_layers": 1,
        "model.num_heads": 1,
        "model.num_kv_heads": 1,
        "model.vocab_size": 8,
        "model.moe.groups": {
            name: {**group, "modalities": [modality]} for name, modality in zip(names, ("text", "image"), strict=True)
        },
        "model.moe.router": router,
    }


def take_a_step(changes: dict[str, Any]) -> None:
    """Builds a model, trains one step, and loads a copy of the state. Asserts that every parameter of the group gets a
    gradient or is frozen."""
    config = tiny_config(Path("data"), Path("runs"), changes)
    groups = expert_groups(config.model.moe)
    assert not list(config.model.moe.violations_in(config))
    placement = ExpertPlacement(groups, (tuple(expert for group in groups for expert in group.experts),))
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=0, ep_group=None)
    freeze(model, config)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=0, std=0.1)
    tokens = torch.arange(8)[None]
    logits, reports = model(tokens, tokens, torch.zeros_like(tokens), tokens % 2)
    (logits.square().mean() + sum(r.aux.auxiliary_LG.sum() for r in reports if r.aux.auxiliary_LG is not None)).backward()
    trained = [each for each in named_parameters(model) if each.parameter.requires_grad]
    assert {each.role for each in trained} & {Role.ROUTER, Role.AUXILIARY_ROUTER}
    assert all(each.parameter.grad is not None for each in trained if each.role is not Role.ROUTER)
    options: dict[str, Any] = {"backend": "torch", "lr": 1e-2, "betas": (0.9, 0.9), "eps": 1e-8}
    optimizer = make_optimizer(split_parameters(model, weight_decay=0.1), **options)
    optimizer.step()
    state = capture(model, optimizer, RankLayout(placement))
    assert state.specs.keys() == state.tensors().keys()
    model.train(False)


ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"router": {"kind": "top_k", "selection_bias": True}, "num_null": 1, "num_identity": 1, "num_constant": 1},
    "expert_choice": {"router": {"kind": "expert_choice", "causal": "threshold"}},
    "auxiliary": {"router": {"kind": "expert_choice", "causal": "auxiliary"}},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", NAMES)
def test_any_name_trains(router: str, name: str) -> None:
    second_stage = {"train.only": "auxiliary_routers", "run.init_from": "elsewhere"}
    take_a_step({**configured((name, "other"), **ROUTERS[router]), **(second_stage if router == "auxiliary" else {})})


@pytest.mark.parametrize("name", ["adapters", "router", "training"])
def test_any_name_trains_under_lora(name: str) -> None:
    group = {"num_experts": 2, "top_k": 1, "ffn_dim": 4, "modalities": ["text", "image"]}
    lora = {"model.moe.experts": {"kind": "lora", "rank": 1, "alpha": 1.0}, "train.only": "adapters"}
    lora |= {"run.init_from": "elsewhere", "run.init_rules": ["adapt"]}
    take_a_step({**configured((name, "other"), {"kind": "top_k"}), **lora, "model.moe.groups": {name: group}})
