"""Builds one expert-parallel layer, and computes its balance loss, for a model of your own (docs/api.md)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats, sum_over
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing import LayerReport
from moe_dist.moe.zero_computation import ZeroComputationExperts, has_zero_computation_experts
from moe_dist.parallel.initialise import normal_tensor
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.roles import Role, named_parameters


def build_moe_layer(
    hidden_dim: int,
    groups: Sequence[ExpertGroup],
    *,
    ep_group: dist.ProcessGroup | None = None,
    placement: ExpertPlacement | None = None,
    router: nn.Module | None = None,
    seed: int = 0,
    std: float = 0.02,
    name: str = "moe",
) -> MoELayer:
    """Builds a layer with this rank's experts and dispatch over `ep_group`.

    `y, report = layer(x, group)` takes x [T, D] and int64 group indices [T], and returns y [T, D] without the residual.
    Weights are normal with `std`, drawn from (seed, logical name), so that they are the same for any number of ranks.

    Args:
        hidden_dim: D.
        groups: All groups of experts, in logical order.
        ep_group: The ranks that share the experts. If None, this process holds all experts.
        placement: The map of experts to ranks; by default each group's experts are spread over all ranks.
        router: A router, whose weights are not changed. If None, `TopKRouter(hidden_dim, groups)` is made.
        name: Name of the layer in logical names and error messages. Each layer of a model needs its own name.
    """
    wire = AllToAll(ep_group, CommStats())
    placement = placement or ExpertPlacement.interleaved(groups, wire.size)
    local = [placement.local_experts(wire.rank, group) for group in groups]
    layer = MoELayer(
        norm=nn.Identity(),
        router=router or TopKRouter(hidden_dim, groups),
        experts=Experts(hidden_dim, groups, [len(experts) for experts in local]),
        dispatcher=AllToAllDispatcher(placement, wire),
        free=ZeroComputationExperts(hidden_dim, groups) if has_zero_computation_experts(groups) else None,
        name=name,
    )
    with torch.no_grad():
        for _, within, role, parameter in named_parameters(layer):
            if role is not Role.EXPERT and not (router and within.startswith("router.")):
                parameter.copy_(normal_tensor(f"{name}.{within}", tuple(parameter.shape), seed=seed, std=std))
        for experts, stack in zip(local, layer.experts.children(), strict=True):
            for tensor, parameter in stack.named_parameters():
                for weight, expert in zip(parameter, experts, strict=True):
                    logical = f"{name}.experts.{placement.name_of(expert)}.{tensor}"
                    weight.copy_(normal_tensor(logical, tuple(weight.shape), seed=seed, std=std))
    return layer


def balance_loss(report: LayerReport, groups: Sequence[ExpertGroup], group: dist.ProcessGroup | None = None) -> Tensor:
    """Returns this rank's share of AdaMoE's load-balance loss of one layer (arXiv 2406.13233, section 3.2), 0-d, with
    coefficient 1. The shares of all ranks add up to the loss. Costs one small all-reduce.

    Args:
        report: The report that the layer returned.
        groups: The layer's expert groups.
        group: Process group of all ranks that train the model; None for one process.
    """
    sums = report.sums
    counts = sum_over(torch.cat([sums.choices_C, sums.tokens_G]), group)
    choices_C, tokens_G = counts.split([len(sums.choices_C), len(sums.tokens_G)])
    tables = ColumnTables.on(tuple(groups), choices_C.device)
    return balance_terms(sums.prob_C[None], choices_C[None], tokens_G[None], tables).sum()
