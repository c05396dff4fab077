"""Draws each initial weight from (seed, logical name), so that weights are bit-identical for every layout of ranks."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dist.model.initial_weights import normal_tensor
from moe_dist.model.transformer import Transformer
from moe_dist.placement.parameter_names import ADAPTERS, EXPERTS, Role, named_parameters, role_of_name
from moe_dist.placement.placement import ExpertPlacement


def initialise(
    model: Transformer, placement: ExpertPlacement, *, ep_rank: int, device: torch.device, seed: int, std: float
) -> None:
    """Allocates a meta-device model on `device`, and initialises every parameter.

    Norms are initialised to 1 and biases to 0. LoRA matrices B are initialised to 0, and A [r, in] is normal with variance
    1 / (3 in), as in LoRA's reference code. Projections into the residual stream (attention.o, every down) are normal with
    standard deviation std / sqrt(2 L), where L is the number of layers. All other parameters are normal with standard
    deviation `std`. A module can set constant initial values for its parameters, by name, in `initial_values`. The host
    draws one whole tensor at a time, and copies this rank's shard to the device.
    """
    allocate(model, device)
    for each in named_parameters(model):
        draw = partial(initial_value, model, each.path, seed=seed, std=std, num_layers=model.args.num_layers)
        shape = tuple(each.parameter.shape)
        if each.role in EXPERTS:
            experts = [draw(name, shape[1:]) for name in logical_expert_names(each.name, placement, ep_rank)]
            set_whole(each.parameter, torch.stack(experts) if experts else torch.empty(shape))
        else:
            set_whole(each.parameter, draw(each.name, shape))


def initial_value(
    model: nn.Module, path: str, name: str, shape: tuple[int, ...], *, seed: int, std: float, num_layers: int
) -> Tensor:
    """Returns the whole (not sharded) initial value of a logical tensor, fp32 on the host. The initial value is the same
    for every engine (`engine.kind`).

    Args:
        path: Name in `model` of the parameter that contains the tensor, alone or stacked with other tensors. The module
            that owns this parameter can set the initial value to a constant.
        name: Logical name, including an expert's index. It determines the value unless the module sets a constant.
    """
    owner, _, leaf = path.rpartition(".")
    constant = getattr(model.get_submodule(owner), "initial_values", {}).get(leaf)
    if constant is not None:  # set here, because tensors on the meta device have no values
        return torch.full(shape, constant)
    role = role_of_name(name)
    if role is Role.NORM:
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if role in ADAPTERS:
        if name.endswith("b"):  # B = 0, so that the initial outputs equal the base model's
            return torch.zeros(shape)
        return normal_tensor(name, shape, seed=seed, std=(3 * shape[-1]) ** -0.5)
    into_residual = name.endswith((".o.weight", ".down.weight", ".down"))
    return normal_tensor(name, shape, seed=seed, std=std / math.sqrt(2 * num_layers) if into_residual else std)


def allocate(model: Transformer, device: torch.device) -> None:
    """Allocates a meta-device model on `device`. Sets the values of routers' buffers, but of no parameter."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)  # leaves values undefined: the caller sets all values
    with device:
        model.reset_buffers()


def logical_expert_names(name: str, placement: ExpertPlacement, ep_rank: int) -> list[str]:
    """Returns the logical names of the experts in this rank's stack `layers.i.moe.experts.<group>.<tensor>`."""
    prefix, group_name, tensor = name.rsplit(".", 2)
    group = next(group for group in placement.groups if group.name == group_name)
    local = placement.local_experts(ep_rank, group)
    return [f"{prefix}.{group_name}.{expert - group.first_expert}.{tensor}" for expert in local]


@torch.no_grad()
def set_whole(parameter: Tensor, full: Tensor) -> None:
    """Copies a whole tensor into a parameter. If the parameter is a DTensor, copies only this rank's shard."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    shape, offset = compute_local_shape_and_global_offset(full.shape, parameter.device_mesh, parameter.placements)
    local = full[tuple(slice(at, at + length) for at, length in zip(offset, shape, strict=True))]
    parameter.to_local().copy_(local)
