"""Splits a model's parameters into the optimizer's groups."""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from moe_dist.placement.roles import ROUTERS, Role, named_parameters

NO_DECAY = ROUTERS | {Role.EMBEDDING, Role.ZERO_COMPUTATION}  # and vectors, of any role


def is_empty_here(parameter: nn.Parameter) -> bool:
    """Whether this rank holds no element: a rank without experts, or a shard beyond the last row."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() == 0


def split_parameters(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, in a fixed order: {"params", "weight_decay"}.

    A fused kernel needs parameters of one kind: so plain tensors, and DTensors of different meshes (dense over all ranks,
    experts over edp), are in different groups. Frozen parameters, and parameters that are empty on this rank, are left out.
    """
    groups: dict[tuple[bool, object], dict[str, Any]] = {}
    for _, _, role, parameter in named_parameters(model):
        if not parameter.requires_grad or is_empty_here(parameter):
            continue
        decay = parameter.ndim >= 2 and role not in NO_DECAY
        key = (decay, parameter.device_mesh if isinstance(parameter, DTensor) else None)  # one group per kind of tensor
        group = groups.setdefault(key, {"params": [], "weight_decay": weight_decay if decay else 0.0})
        group["params"].append(parameter)
    return list(groups.values())
