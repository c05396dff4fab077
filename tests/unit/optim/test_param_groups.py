from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.placement.parameter_names import Role
from tests.support.worlds import RankContext

pytestmark = pytest.mark.slow


def model_of(**parameters: tuple[Role, tuple[int, ...]]) -> nn.Module:
    """Returns a module with one child per parameter, with its role and a `weight` of its shape."""
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


def step_over_meshes(rank: RankContext) -> list[set[str]]:
    """Takes a step over plain tensors and DTensors of two meshes, one of them empty on rank 1. Returns the kinds of tensors
    in each group."""
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("world", "edp"))
    parameters = {
        "plain": nn.Parameter(torch.ones(2, 2)),
        "dense": nn.Parameter(distribute_tensor(torch.ones(4, 2), grid["world"], [Shard(0)])),
        "expert": nn.Parameter(distribute_tensor(torch.ones(3, 2), grid["edp"], [Shard(0)])),
        "short": nn.Parameter(distribute_tensor(torch.ones(1, 2), grid["world"], [Shard(0)])),
    }
    model = nn.Module()
    for name, parameter in parameters.items():
        model.register_parameter(name, parameter)
    groups = split_parameters(model, weight_decay=0.0)
    optimizer = make_optimizer(groups, backend="torch", lr=0.5, betas=(0.9, 0.95), eps=1e-8)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in (p for group in groups for p in group["params"]):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(local.detach(), torch.full_like(local, 0.5))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    return [{name_of[id(parameter)] for parameter in group["params"]} for group in groups]


def test_a_group_never_mixes_meshes_nor_plain_tensors(run_in_world: Callable[..., list[Any]]) -> None:
    first, second = run_in_world(2, step_over_meshes)
    assert first == [{"plain"}, {"dense", "short"}, {"expert"}]
    assert second == [{"plain"}, {"dense"}, {"expert"}]
