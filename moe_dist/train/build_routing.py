"""Turns configuration sections into routers, load controllers, and selection scopes."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn

from moe_dist.comm.collectives import CommStats
from moe_dist.config.model_schema import MoESection
from moe_dist.config.routers.base import RouterSection
from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.active_experts import ActiveExperts
from moe_dist.moe.balance.controller import BiasController, Rule
from moe_dist.moe.balance.loss_free import LossFree
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.group_limited import GroupLimitedRouter
from moe_dist.moe.routers.scheduled_top_k import ScheduledTopKRouter
from moe_dist.moe.routers.selection import ScopeRanks, SelectionScope
from moe_dist.moe.routers.thresholds import ThresholdUpdater
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.roles import group_module

ROUTERS: dict[str, type[nn.Module]] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "group_limited": GroupLimitedRouter,
    "scheduled_top_k": ScheduledTopKRouter,
}
CONTROLLERS: dict[str, type[Rule]] = {
    "active_experts": ActiveExperts,
    "loss_free": LossFree,
}


def build_router(section: RouterSection, hidden_dim: int, groups: Sequence[ExpertGroup], **known: Any) -> nn.Module:
    """The router of one layer; a section's fields are its constructor's keywords.

    Args:
        known: Further values of the layer, of which the constructor gets those that it names: `capacity` (of token choice),
            `seed`, `layer`, `place` (among the MoE layers), `selection_scope`, `known_counts`.
    """
    router = ROUTERS[section.kind]
    named = signature(router).parameters
    # A section's own field takes precedence: expert choice has another `capacity`.
    return router(hidden_dim, groups, **{key: known[key] for key in known if key in named} | section.keywords())


def build_balance(section: MoESection, model: Transformer, groups: Sequence[ExpertGroup]) -> BiasController | None:
    """The controller of the model's selection biases; None without rules. A rule's fields are its keywords."""
    rules = [CONTROLLERS[each.kind](**each.model_dump(exclude={"kind"})) for each in section.balance]
    if not rules:
        return None
    gates_LG = [[moe.router.get_submodule(group_module(group.name)) for group in groups] for moe in model.moe_modules()]
    return BiasController(gates_LG, groups, rules)  # pyright: ignore[reportArgumentType]


def scope_ranks_of(mesh: Mesh) -> ScopeRanks:
    """The ranks over which experts may choose, from the mesh."""
    return ScopeRanks(mesh.world, mesh.world_size, mesh.rank, mesh.ep, mesh.ep_ranks)


def build_depth_scope(config: Config, mesh: Mesh, comm_stats: CommStats) -> SelectionScope | None:
    """The ranks whose tokens compete in mixture-of-depths layers, by `model.mixture_of_depths.scope`."""
    section = config.model.mixture_of_depths
    if section is None:
        return None
    return SelectionScope.over(section.scope, scope_ranks_of(mesh), comm_stats=comm_stats, tracker=mesh.tracker)


def depth_thresholds(model: Transformer) -> ThresholdUpdater | None:
    """Updates the thresholds of mixture-of-depths routers after each step; None if there are none."""
    routers = [router for router in model.depth_routers() if router.causal == "threshold"]
    if not routers:
        return None
    return ThresholdUpdater([[router] for router in routers], routers[0].threshold_decay, mixture_of_depths=True)
