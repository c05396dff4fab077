from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_dist.optim.adamw import make_optimizer
from moe_dist.optim.param_groups import split_parameters
from tests.support.worlds import RankContext


def named(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("__", "."), nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def test_norms_embeddings_and_routers_do_not_decay() -> None:
    parameters = named(
        embedding__weight=(8, 4),
        layers__0__attention__norm__weight=(4,),
        layers__0__attention__q__weight=(4, 4),
        layers__0__attention__q_norm__weight=(4,),
        layers__0__moe__router__text__true=(2, 4),
        layers__0__moe__router__text__null=(2, 4),
        layers__0__moe__experts__text__gate=(2, 6, 4),
        layers__0__moe__experts__router__gate=(2, 6, 4),  # a group may have any name
        output__weight=(8, 4),
    )
    groups = split_parameters(parameters, weight_decay=0.1)
    name_of = {id(parameter): name for name, parameter in parameters}
    decayed = {name_of[id(p)] for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    kept = {name_of[id(p)] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed == {
        "layers.0.attention.q.weight",
        "layers.0.moe.experts.text.gate",
        "layers.0.moe.experts.router.gate",
        "output.weight",
    }
    assert decayed | kept == set(name_of.values())


def test_empty_and_frozen_parameters_are_left_out() -> None:
    parameters = named(a__weight=(2, 2), layers__0__moe__experts__image__up=(0, 4, 2), frozen__weight=(2, 2))
    parameters[2][1].requires_grad_(False)
    (group,) = split_parameters(parameters, weight_decay=0.1)
    assert group["params"] == [parameters[0][1]]


def step_over_meshes(rank: RankContext) -> list[set[str]]:
    """A step over plain tensors and DTensors of two meshes, one of them empty on rank 1; kinds of each group."""
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("world", "edp"))
    parameters = {
        "plain": nn.Parameter(torch.ones(2, 2)),
        "dense": nn.Parameter(distribute_tensor(torch.ones(4, 2), grid["world"], [Shard(0)])),
        "expert": nn.Parameter(distribute_tensor(torch.ones(3, 2), grid["edp"], [Shard(0)])),
        "short": nn.Parameter(distribute_tensor(torch.ones(1, 2), grid["world"], [Shard(0)])),
    }
    groups = split_parameters(parameters.items(), weight_decay=0.0)
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
