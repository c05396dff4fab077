"""Draws initial weights from (seed, logical name), so that they are bit-identical for every layout of ranks."""

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dist.model.transformer import Transformer
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.roles import ADAPTERS, EXPERTS, NamedParameter, Role, named_parameters


def initialise(
    model: Transformer, placement: ExpertPlacement, *, ep_rank: int, device: torch.device, seed: int, std: float
) -> None:
    """Allocates a meta-device model on `device`, and initialises every parameter.

    Norms start at 1 and biases at 0. LoRA matrices B start at 0, and A [r, in] is normal with variance 1 / (3 in), as in
    LoRA's own code. All other parameters are normal with `std`; projections into the residual stream (attention.o, every
    down) have std / sqrt(2 L), with L layers. A module can set constants for its parameters by name in `initial_values`.
    The host draws one whole tensor at a time, and copies this rank's shard to the device.
    """
    allocate(model, device)
    residual = std / math.sqrt(2 * model.args.num_layers)
    for each in named_parameters(model):
        scale = residual if each.name.endswith((".o.weight", ".down.weight", ".down")) else std
        owner, _, leaf = each.path.rpartition(".")
        constant = getattr(model.get_submodule(owner), "initial_values", {}).get(leaf)
        drawn = constant is None  # constants are set here, because the meta device stores no values
        shape = each.parameter.shape
        set_whole(each.parameter, _draw(each, placement, ep_rank, seed, scale) if drawn else torch.full(shape, constant))


def allocate(model: Transformer, device: torch.device) -> None:
    """Allocates a meta-device model on `device`. Sets the buffers of routers, but no parameter."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)  # sets no values: the caller overwrites all of them
    for module in [*(moe.router for moe in model.moe_modules()), *model.depth_routers()]:
        with device:
            module.reset_buffers()  # pyright: ignore[reportCallIssue]


def logical_expert_names(name: str, placement: ExpertPlacement, ep_rank: int) -> list[str]:
    """Returns the logical names of the experts in this rank's stack `layers.i.moe.experts.<group>.<tensor>`."""
    prefix, group_name, tensor = name.rsplit(".", 2)
    group = next(group for group in placement.groups if group.name == group_name)
    local = placement.local_experts(ep_rank, group)
    return [f"{prefix}.{group_name}.{expert - group.first_expert}.{tensor}" for expert in local]


def _draw(named: NamedParameter, placement: ExpertPlacement, ep_rank: int, seed: int, scale: float) -> Tensor:
    """Returns the whole (not sharded) initial value of a parameter, on the host."""
    name, shape = named.name, tuple(named.parameter.shape)
    if named.role is Role.NORM:
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if named.role in ADAPTERS:
        if name.endswith("b"):  # B = 0: outputs start equal to the base model's
            return torch.zeros(shape)
        scale = (3 * shape[-1]) ** -0.5
    if named.role in EXPERTS:
        names = logical_expert_names(name, placement, ep_rank)
        experts = [normal_tensor(each, shape[1:], seed=seed, std=scale) for each in names]
        return torch.stack(experts) if experts else torch.empty(shape)
    return normal_tensor(name, shape, seed=seed, std=scale)


def normal_tensor(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    """Returns the initial value of the tensor with this logical name: fp32, normal with `std`, drawn from (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()  # Python's hash() differs in each process
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # a seed must be below 2^63
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


@torch.no_grad()
def set_whole(parameter: Tensor, full: Tensor) -> None:
    """Copies a whole tensor into a parameter. If the parameter is a DTensor, copies only this rank's shard."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    shape, offset = compute_local_shape_and_global_offset(full.shape, parameter.device_mesh, parameter.placements)
    local = full[tuple(slice(at, at + length) for at, length in zip(offset, shape, strict=True))]
    parameter.to_local().copy_(local)
