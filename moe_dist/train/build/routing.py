"""Makes routers, load controllers and selection scopes from the configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.comm.collectives import CommStats
from moe_dist.config.model_schema import MoESection
from moe_dist.config.routers.base import RouterSection
from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.active_experts import ActiveExperts
from moe_dist.moe.balance.controller import AimingRule, BiasController, Rule
from moe_dist.moe.balance.loss_free import LossFree
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.expert_threshold import ExpertThresholdRouter
from moe_dist.moe.routers.gating_residual import GatingResidualRouter
from moe_dist.moe.routers.group_limited import GroupLimitedRouter
from moe_dist.moe.routers.predicted_k import PredictedKRouter
from moe_dist.moe.routers.relu import ReLURouter
from moe_dist.moe.routers.scheduled_top_k import ScheduledTopKRouter
from moe_dist.moe.routers.selection import ScopeKind, SelectionScope
from moe_dist.moe.routers.threshold import ThresholdRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routers.top_k_by_id import TopKByIdRouter
from moe_dist.moe.routers.top_p import TopPRouter
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup

ROUTERS: dict[str, type[nn.Module]] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "gating_residual": GatingResidualRouter,
    "group_limited": GroupLimitedRouter,
    "scheduled_top_k": ScheduledTopKRouter,
    "top_k_by_id": TopKByIdRouter,
    "top_p": TopPRouter,
    "relu": ReLURouter,
    "threshold": ThresholdRouter,
    "predicted_k": PredictedKRouter,
    "expert_threshold": ExpertThresholdRouter,
}
CONTROLLERS: dict[str, type[Rule]] = {
    "active_experts": ActiveExperts,
    "loss_free": LossFree,
}


def build_router(section: RouterSection, hidden_dim: int, groups: Sequence[ExpertGroup], **known: Any) -> nn.Module:
    """Makes the router of one MoE layer. The fields of `section` become keywords of the router's constructor.

    Args:
        known: Further values by name: `capacity` (for routers where tokens choose), `seed`, `layer`, `place` (index among
            the MoE layers), `selection_scope`, `known_counts`, `kernels`. The router's constructor gets the values for
            which it has a parameter.
    """
    router = ROUTERS[section.kind]
    named = signature(router).parameters
    # A field of the section overrides a value of `known`: expert choice has a `capacity` of its own.
    return router(hidden_dim, groups, **{key: known[key] for key in known if key in named} | section.keywords())


def build_balance(
    section: MoESection, routers: Sequence[nn.Module | None], groups: Sequence[ExpertGroup], device: torch.device
) -> BiasController | None:
    """Makes the controller of selection biases with one rule per section of `balance`; returns None without sections.

    Args:
        routers: The router of each MoE layer of the whole model; None for a layer that this rank does not have.
    """
    rules = _rules(section)
    if not rules:
        return None
    gates_LG = [
        [_Elsewhere(torch.zeros(group.num_columns, device=device)) for group in groups]
        if router is None
        else [router.get_submodule(group_module(group.name)) for group in groups]
        for router in routers
    ]
    return BiasController(gates_LG, groups, rules)  # pyright: ignore[reportArgumentType]


def build_targets(section: MoESection, groups: Sequence[ExpertGroup]) -> dict[str, Callable[[int], float]]:
    """Returns for each group with a target a function that maps a number of updates of the selection biases to the true
    experts per token at which the next update aims."""
    return {
        group.name: partial(rule.target_at, group=group)
        for each, rule in zip(section.balance, _rules(section), strict=True)
        for group in groups
        if group.name in each.targets and isinstance(rule, AimingRule)
    }


def _rules(section: MoESection) -> list[Rule]:
    return [CONTROLLERS[each.kind](**each.model_dump(exclude={"kind"})) for each in section.balance]


@dataclass
class _Elsewhere:
    """Replaces a gate of another pipeline stage, so that rules see all layers and have the same state on every rank."""

    bias: Tensor


def build_thresholds(
    section: MoESection, routers: Sequence[nn.Module | None], groups: Sequence[ExpertGroup], device: torch.device
) -> ThresholdUpdater | None:
    """Makes the controller of the thresholds of experts that choose tokens; returns None if tokens choose experts.
    `build_balance` describes `routers`."""
    if not section.router.experts_choose:
        return None
    gates_LG: list[Any] = [
        [_ElsewhereChosen(torch.zeros(3, group.num_experts, device=device)) for group in groups]
        if router is None
        else router.gates()  # pyright: ignore[reportCallIssue]
        for router in routers
    ]
    decay = section.router.threshold_decay  # pyright: ignore[reportAttributeAccessIssue]
    return ThresholdUpdater(gates_LG, decay, dtype=torch.float64)


@dataclass
class _ElsewhereChosen:
    """Replaces a gate of another pipeline stage if experts choose tokens."""

    buffers_3n: Tensor

    def running_mean(self) -> tuple[Tensor, Tensor, Tensor]:
        threshold_n, mean_n, steps_n = self.buffers_3n
        return threshold_n, mean_n, steps_n


def build_scopes(config: Config, mesh: Mesh, comm_stats: CommStats) -> tuple[SelectionScope, SelectionScope | None]:
    """Returns two scopes: the ranks whose tokens compete for an expert in expert choice, and the ranks whose tokens compete
    in a mixture-of-depths layer (None without such layers)."""

    def scope(kind: ScopeKind) -> SelectionScope:
        ranks = {"rank": (mesh.rank,), "ep_group": mesh.ep_ranks, "world": tuple(range(mesh.world_size))}[kind]
        group = {"rank": None, "ep_group": mesh.ep, "world": mesh.world if mesh.world_size > 1 else None}[kind]
        return SelectionScope(kind, group, ranks, ranks.index(mesh.rank), mesh.ep_ranks, comm_stats, mesh.tracker)

    depths = config.model.mixture_of_depths
    return scope(config.model.moe.router.selection_scope), None if depths is None else scope(depths.scope)


def depth_thresholds(model: Transformer) -> ThresholdUpdater | None:
    """Makes the controller that updates the thresholds of mixture-of-depths routers; returns None if no router has a
    threshold."""
    routers = [router for router in model.depth_routers() if router.causal == "threshold"]
    if not routers:
        return None
    return ThresholdUpdater([[router] for router in routers], routers[0].threshold_decay, mixture_of_depths=True)
