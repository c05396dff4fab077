import torch
from torch import nn

from moe_dist.optim.param_groups import split_parameters


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
