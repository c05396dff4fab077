"""Turns configuration sections into what chooses: routers, load controllers, and the ranks whose tokens compete."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from moe_dist.comm.collectives import CommStats
from moe_dist.config.model_schema import ExpertChoiceRouterSection, MoESection, RouterSection, ScheduledTopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.active_experts import ActiveExperts
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.balance.loss_free import LossFree
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.scheduled_top_k import ScheduledTopKRouter
from moe_dist.moe.routers.selection import ScopeRanks, SelectionScope
from moe_dist.moe.routers.thresholds import ThresholdUpdater
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup


def build_router(
    section: RouterSection,
    hidden_dim: int,
    groups: Sequence[ExpertGroup],
    *,
    capacity: Capacity | None = None,
    **choice: Any,
) -> nn.Module:
    """The router of one layer; a section's fields are its constructor's keywords (the selection scope's kind is part of one).

    Args:
        capacity: Of routers by token choice.
        choice: `selection_scope`, `seed`, `layer` and `known_counts` of routers by expert choice; `seed` and `place` (among the
            MoE layers) of those with a fixed load.
    """
    if isinstance(section, ScheduledTopKRouterSection):
        own = {key: choice[key] for key in ("seed", "place") if key in choice}
        return ScheduledTopKRouter(hidden_dim, groups, capacity=capacity, **section.model_dump(exclude={"kind"}), **own)
    choice.pop("place", None)
    if isinstance(section, ExpertChoiceRouterSection):
        return ExpertChoiceRouter(hidden_dim, groups, **section.model_dump(exclude={"kind", "scope"}), **choice)
    return TopKRouter(hidden_dim, groups, capacity=capacity, **section.model_dump(exclude={"kind"}))


def build_balance(section: MoESection, model: Transformer, groups: Sequence[ExpertGroup]) -> BiasController | None:
    """The controller of the model's selection biases; None where there are no rules. A rule's fields are its keywords."""
    kinds = {"active_experts": ActiveExperts, "loss_free": LossFree}
    rules = [kinds[each.kind](**each.model_dump(exclude={"kind"})) for each in section.balance]
    if not rules:
        return None
    gates_LG = [[moe.router.get_submodule(group.name) for group in groups] for moe in model.moe_modules()]
    return BiasController(gates_LG, groups, rules)  # pyright: ignore[reportArgumentType]


def scope_ranks_of(mesh: Mesh) -> ScopeRanks:
    """Over which ranks experts may choose, from the mesh."""
    return ScopeRanks(mesh.world, mesh.world_size, mesh.rank, mesh.ep, mesh.ep_ranks)


def build_depth_scope(config: Config, mesh: Mesh, comm_stats: CommStats) -> SelectionScope | None:
    """The ranks among whose tokens layers choose, by `model.mixture_of_depths.scope`."""
    section = config.model.mixture_of_depths
    if section is None:
        return None
    return SelectionScope.over(section.scope, scope_ranks_of(mesh), comm_stats=comm_stats, tracker=mesh.tracker)


def depth_thresholds(model: Transformer) -> ThresholdUpdater | None:
    """Follows the depth routers' choices after each step; None where none has a threshold."""
    routers = [router for router in model.depth_routers() if router.causal == "threshold"]
    return ThresholdUpdater([[router] for router in routers], routers[0].threshold_decay) if routers else None
