"""Makes routers, load controllers and selection scopes from the configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.comm.collectives import CommStats
from moe_dist.config.model_schema import ModelSection, MoESection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.controller import AimingRule, BiasController, Rule
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.selection import ScopeKind, SelectionScope
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup


def router_context(config: Config, groups: Sequence[ExpertGroup], **known: Any) -> RouterContext:
    """Returns the arguments with which the routers of all layers are made. `known` has more fields of `RouterContext`."""
    limit = config.model.moe.capacity
    capacity = None if limit is None else Capacity(**limit.model_dump())
    return RouterContext(config.model.hidden_dim, groups, capacity=capacity, seed=config.run.seed, **known)


def build_router(section: ModelSection, context: RouterContext, layer: int) -> nn.Module:
    """Makes the router of the MoE layer whose index among all layers is `layer`."""
    router = section.moe.router.build(replace(context, layer=layer, place=section.moe_layers.index(layer)))
    if context.capacity is not None and getattr(router, "capacity", None) is not context.capacity:
        raise ConfigError(
            f"model.moe.capacity: {section.moe.router.builds} drops no pair, because it does not keep `context.capacity` "
            "as its attribute `capacity`; set model.moe.capacity to null, or derive the class from TopKRouter"
        )
    return router


def build_balance(
    section: MoESection, routers: Sequence[nn.Module | None], groups: Sequence[ExpertGroup], device: torch.device
) -> BiasController | None:
    """Makes the controller of selection biases, with one rule per section of `balance`. Returns None without such sections.
    `routers` lists the routers of all MoE layers of the model; an entry is None if this rank does not have the layer."""
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
    """Returns a function for each group with a target number of true experts per token. From the number of past updates of
    the selection biases, the function computes the target of the next update."""
    return {
        group.name: partial(rule.target_at, group=group)
        for each, rule in zip(section.balance, _rules(section), strict=True)
        for group in groups
        if group.name in each.targets and isinstance(rule, AimingRule)
    }


def _rules(section: MoESection) -> list[Rule]:
    return [each.build() for each in section.balance]


@dataclass
class _Elsewhere:
    """Stands for a gate of another pipeline stage, so that rules see all layers and have the same state on every rank."""

    bias: Tensor


def build_thresholds(
    section: MoESection, routers: Sequence[nn.Module | None], groups: Sequence[ExpertGroup], device: torch.device
) -> ThresholdUpdater | None:
    """Makes the controller of expert choice's thresholds; None if tokens choose. For `routers` see `build_balance`."""
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
    """Stands for a gate of another pipeline stage if experts choose tokens."""

    buffers_3n: Tensor

    def running_mean(self) -> tuple[Tensor, Tensor, Tensor]:
        threshold_n, mean_n, steps_n = self.buffers_3n
        return threshold_n, mean_n, steps_n


def build_scopes(config: Config, mesh: Mesh, comm_stats: CommStats) -> tuple[SelectionScope, SelectionScope | None]:
    """Returns two scopes. The first has the ranks whose tokens compete for an expert in expert choice. The second has the
    ranks whose tokens compete in a mixture-of-depths layer; it is None without such layers."""

    def scope(kind: ScopeKind) -> SelectionScope:
        ranks = {"rank": (mesh.rank,), "ep_group": mesh.ep_ranks, "world": tuple(range(mesh.world_size))}[kind]
        group = {"rank": None, "ep_group": mesh.ep, "world": mesh.world if mesh.world_size > 1 else None}[kind]
        return SelectionScope(kind, group, ranks, ranks.index(mesh.rank), mesh.ep_ranks, comm_stats, mesh.tracker)

    depths = config.model.mixture_of_depths
    return scope(config.model.moe.router.selection_scope), None if depths is None else scope(depths.scope)


def depth_thresholds(model: Transformer) -> ThresholdUpdater | None:
    """Makes the controller of mixture-of-depths thresholds; returns None if no router has a threshold."""
    routers = [router for router in model.depth_routers() if router.causal == "threshold"]
    if not routers:
        return None
    return ThresholdUpdater([[router] for router in routers], routers[0].threshold_decay, mixture_of_depths=True)
