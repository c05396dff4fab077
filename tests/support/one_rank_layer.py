"""An MoE layer of one rank, with drawn weights."""

from typing import Any

import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts, has_zero_computation_experts
from moe_dist.moe.layer import MoELayer
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


def context_of(groups: tuple[ExpertGroup, ...], **fields: Any) -> DispatchContext:
    """Returns the context of a dispatcher on one rank with all experts."""
    experts = tuple(expert for group in groups for expert in group.experts)
    return DispatchContext(ExpertPlacement(groups, (experts,)), AllToAll(None, CommStats()), **fields)


def one_rank_layer(
    router: Any,
    dim: int,
    *,
    placement: ExpertPlacement | None = None,
    rank: int = 0,
    recompute: Any = "none",
    dispatcher: Any = None,
    norm: torch.nn.Module | None = None,
    shared: torch.nn.Module | None = None,
    std: float = 1.0,
    **experts: Any,
) -> MoELayer:
    """Returns a layer with the router's groups. Its parameters and selection biases are drawn with deviation `std`.

    Args:
        placement: The layer has this placement's experts of `rank`. By default it has all experts.
        dispatcher: By default `AllToAllDispatcher` on one rank.
        experts: Options of `Experts`.
    """
    groups = tuple(router.groups)
    local = [group.num_experts if placement is None else len(placement.local_experts(rank, group)) for group in groups]
    layer = MoELayer(
        norm=norm or torch.nn.Identity(),
        router=router,
        experts=Experts(dim, groups, local, **experts),
        dispatcher=dispatcher or AllToAllDispatcher(context_of(groups)),
        shared=shared,
        free=ZeroComputationExperts(dim, groups) if has_zero_computation_experts(groups) else None,
        recompute=recompute,
    )
    for tensor in [*layer.parameters(), *(each for name, each in layer.named_buffers() if name.endswith("bias"))]:
        torch.nn.init.normal_(tensor, std=std)
    return layer
