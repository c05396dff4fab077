"""A group may have any name, also the name of an attribute of the modules that hold it."""

import keyword
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.config.base.section import GROUP_PATTERN
from moe_dist.model.transformer import Transformer
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.lora import LoRAExperts
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.parameter_names import Role, named_parameters
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model, freeze
from tests.support.cover import exhaustive
from tests.support.tiny import tiny_config

GROUP = ExpertGroup("text", 2, 1, 1, 4, 0, ("text",), num_identity=1, num_constant=1)
PLAIN = ExpertGroup("text", 2, 0, 1, 4, 0, ("text",))
ROLES = {"adapters", "auxiliary", "depths", "embedding", "experts", "free", "group", "norm", "router", "true", "null"}


def names_in_use() -> list[tuple[str, str]]:
    """Attributes of the modules that hold groups, Python's keywords, and the parts of parameters' names; in pairs."""
    modules = [Experts(4, (GROUP,), (2,)), TopKRouter(RouterContext(4, (GROUP,))), ZeroComputationExperts(4, (GROUP,))]
    modules += [
        ExpertChoiceRouter(RouterContext(4, (PLAIN,)), causal="auxiliary"),
        LoRAExperts(4, 4, (GROUP,), rank=1, alpha=1.0),
    ]
    found = {name for module in [*modules, nn.Module()] for name in dir(module)} | ROLES | set(keyword.kwlist)
    found |= {name for cls in (MoELayer, Transformer) for name in dir(cls)} | {"smart_apply", "speech-2"}
    names = sorted(name for name in found if re.fullmatch(GROUP_PATTERN, name))
    return list(zip(names[::2], [*names[1::2], "other"][: len(names[::2])], strict=True))


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
    """Builds a model, trains one step, and loads a copy of the state. All parameters of the group get a gradient or are
    frozen."""
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
}
NAMES = names_in_use()
PRODUCT = [(router, names) for router in ROUTERS for names in NAMES]


@pytest.mark.parametrize(
    ("router", "names"), [case if n % 2 == (n >= len(NAMES)) else exhaustive(*case) for n, case in enumerate(PRODUCT)]
)
def test_any_name_trains(router: str, names: tuple[str, str]) -> None:
    """Every second pair of names with each router, all pairs with one of them."""
    take_a_step(configured(names, **ROUTERS[router]))


@pytest.mark.parametrize("name", sorted(ROLES))
def test_any_name_trains_with_auxiliary_routers(name: str) -> None:
    second_stage = {"train.only": "auxiliary_routers", "run.init_from": "elsewhere"}
    take_a_step({**configured((name, "other"), {"kind": "expert_choice", "causal": "auxiliary"}), **second_stage})


@pytest.mark.parametrize("name", ["adapters", "router", "training"])
def test_any_name_trains_under_lora(name: str) -> None:
    group = {"num_experts": 2, "top_k": 1, "ffn_dim": 4, "modalities": ["text", "image"]}
    lora = {"model.moe.experts": {"kind": "lora", "rank": 1, "alpha": 1.0}, "train.only": "adapters"}
    lora |= {"run.init_from": "elsewhere", "run.init_rules": ["adapt"]}
    take_a_step({**configured((name, "other"), {"kind": "top_k"}), **lora, "model.moe.groups": {name: group}})
