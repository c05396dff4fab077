import pytest
import torch
from torch import nn

from moe_dist.optim.optimizer import split_parameters
from moe_dist.placement.parameter_names import Role

pytestmark = pytest.mark.slow


def model_of(**parameters: tuple[Role, tuple[int, ...]]) -> nn.Module:
    """Returns a module with one child per parameter. The child has the parameter's role, and a `weight` of the
    parameter's shape."""
    model = nn.Module()
    for name, (role, shape) in parameters.items():
        child = nn.Module()
        child.role, child.weight = role, nn.Parameter(torch.ones(shape))  # pyright: ignore[reportAttributeAccessIssue]
        model.add_module(name, child)
    return model


def test_norms_embeddings_and_routers_do_not_decay() -> None:
    model = model_of(
        embedding=(Role.EMBEDDING, (8, 4)),
        norm=(Role.NORM, (4,)),
        q=(Role.DENSE, (4, 4)),
        q_bias=(Role.DENSE, (4,)),
        router=(Role.ROUTER, (2, 4)),
        depths=(Role.DEPTH_ROUTER, (1, 4)),
        auxiliary=(Role.AUXILIARY_ROUTER, (2, 4)),
        experts=(Role.EXPERT, (2, 6, 4)),
        constant=(Role.ZERO_COMPUTATION, (2, 4)),
        adapter=(Role.ADAPTER, (2, 4)),
    )
    groups = split_parameters(model, weight_decay=0.1)
    name_of = {parameter: name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    decayed = {name_of[p] for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    kept = {name_of[p] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed == {"q", "experts", "adapter"}
    assert decayed | kept == set(name_of.values())


def test_empty_and_frozen_parameters_are_left_out() -> None:
    model = model_of(a=(Role.DENSE, (2, 2)), experts=(Role.EXPERT, (0, 4, 2)), frozen=(Role.DENSE, (2, 2)))
    model.get_submodule("frozen").requires_grad_(False)
    (group,) = split_parameters(model, weight_decay=0.1)
    assert group["params"] == [model.get_parameter("a.weight")]
