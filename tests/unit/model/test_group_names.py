"""A group's name becomes the name of a submodule: those that a module uses itself are refused before anything is built."""

import re

import pytest

from moe_dist.config.section import GROUP_PATTERN
from moe_dist.moe.experts import Experts
from moe_dist.moe.lora import LoRAExperts
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.zero_computation import ZeroComputationExperts
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan.preflight import group_violations

GROUP = ExpertGroup("text", 2, 1, 1, 4, 0, ("text",), num_identity=1, num_constant=1)


def names_in_use() -> set[str]:
    """With what transformers adds to every module once it has made a model, be it here or not."""
    modules = [Experts(4, (GROUP,), (2,)), TopKRouter(4, (GROUP,)), ZeroComputationExperts(4, (GROUP,))]
    modules.append(LoRAExperts(4, 4, (GROUP,), rank=1, alpha=1.0))
    return {name for module in modules for name in dir(module) if re.match(GROUP_PATTERN, name)} - {"text"} | {
        "smart_apply"
    }


def test_every_name_in_use_is_refused_with_a_way_out() -> None:
    names = names_in_use()
    assert {"type", "train", "groups", "pair_budget"} <= names
    for name in names:
        (violation,) = group_violations((ExpertGroup(name, 2, 1, 1, 4, 0, (name,)),))
        assert f"call the group {name}_experts" in violation.problem


@pytest.mark.parametrize("name", ["text", "image", "type_experts", "all", "speech-2"])
def test_other_names_build(name: str) -> None:
    group = ExpertGroup(name, 2, 1, 1, 4, 0, (name,))
    assert group_violations((group,)) == []
    Experts(4, (group,), (2,))
    TopKRouter(4, (group,))
    ZeroComputationExperts(4, (group,))
