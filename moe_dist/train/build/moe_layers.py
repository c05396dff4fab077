"""Makes MoE layers, their routers, load controllers and selection scopes, and LoRA adapters from the configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.config.model_schema import ModelSection, MoESection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.model.layers import GatedSwiGLU, Projection, RMSNorm, SwiGLU
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.controller import AimingRule, BiasController, Rule
from moe_dist.moe.experts.experts import Experts, on_host
from moe_dist.moe.experts.lora import PROJECTIONS, Adapter, LoRALayer
from moe_dist.moe.experts.static_storage import on_device
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts, has_zero_computation_experts
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.selection import ScopeKind, SelectionScope
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.build.dispatch import NodeGroups, dispatch_context


class AdaptedProjection(Projection):
    """A projection of the shared expert, and its LoRA adapter: W' x = W x + (alpha / r) B A x, where W is frozen."""

    def __init__(self, in_dim: int, out_dim: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_dim, out_dim)
        self.adapter, self._scale = Adapter(in_dim, out_dim, rank), alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self._scale * self.adapter(x)


def adapted(ffn: SwiGLU, *, rank: int, alpha: float) -> SwiGLU:
    """Adds adapters to gate, up and down of a new FFN in place. Returns the FFN."""
    for name in PROJECTIONS:
        out_dim, in_dim = ffn.get_submodule(name).get_parameter("weight").shape
        setattr(ffn, name, AdaptedProjection(in_dim, out_dim, rank=rank, alpha=alpha))
    return ffn


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
    """Placeholder for a gate of another pipeline stage. With it, rules see all layers and have equal state on all ranks."""

    bias: Tensor


def build_thresholds(
    section: MoESection, routers: Sequence[nn.Module | None], groups: Sequence[ExpertGroup], device: torch.device
) -> ThresholdUpdater | None:
    """Makes the controller of thresholds for expert choice; returns None if tokens choose experts. For `routers` see
    `build_balance`."""
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
    """Placeholder for a gate of another pipeline stage if experts choose tokens."""

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


@dataclass(frozen=True)
class LayerParts:
    """The arguments with which the functions of this file make MoE layers."""

    config: Config
    placement: ExpertPlacement
    ep_rank: int
    all_to_all: AllToAll  # all-to-all of the EP group
    node_groups: NodeGroups
    choice_scope: SelectionScope | None  # for expert choice: the ranks whose tokens compete for an expert
    kernels: RowKernels = TORCH


def ffn_layers(parts: LayerParts) -> Callable[[int], MoELayer]:
    """Returns a function that makes an MoE layer with FFN experts from the layer's index."""
    config, groups, all_to_all = parts.config, parts.placement.groups, parts.all_to_all
    section, moe, hidden_dim = config.model, config.model.moe, config.model.hidden_dim
    # In a dry run the placement can have many ranks without a process group, because the layers never run.
    dispatcher = config.parallel.dispatch.build(  # all layers share one dispatcher, because it may allocate large buffers
        dispatch_context(
            config.parallel,
            parts.placement,
            all_to_all,
            hidden_dim,
            parts.node_groups,
            parts.kernels,
            tokens=config.train.micro_batch * config.data.seq_len,
        )
    )
    selection_scope = parts.choice_scope or SelectionScope(moe.router.selection_scope)
    known_counts = dispatcher.takes_known_counts and selection_scope.kind == "rank"
    known = {"selection_scope": selection_scope, "known_counts": known_counts, "kernels": parts.kernels}
    context = router_context(config, groups, **known)
    activation, adapter = moe.experts.base.build(), moe.experts.build() if moe.experts.adapts_ffns else None

    def make(layer: int) -> MoELayer:
        return MoELayer(
            norm=RMSNorm(hidden_dim, section.norm_eps),
            router=build_router(section, context, layer),
            experts=Experts(
                hidden_dim,
                groups,
                [len(parts.placement.local_experts(parts.ep_rank, group)) for group in groups],
                activation=activation,
                adapter=adapter,
                storage=on_device if config.parallel.dispatch.static else on_host,
                pair_budget=config.parallel.expert_pair_budget,
                gemm=config.parallel.expert_gemm,
                kernels=parts.kernels,
            ),
            dispatcher=dispatcher,
            shared=_shared_expert(section) if moe.shared_ffn_dim else None,
            free=ZeroComputationExperts(hidden_dim, groups) if has_zero_computation_experts(groups) else None,
            shortcut=moe.shortcut,
            recompute=config.parallel.recompute,
            name=f"layers.{layer}",
        )

    return make


def _shared_expert(section: ModelSection) -> SwiGLU:
    moe = section.moe
    shared = (GatedSwiGLU if moe.shared_gate else SwiGLU)(section.hidden_dim, moe.shared_ffn_dim)
    rank = moe.experts.shared_expert_rank
    return adapted(shared, rank=rank, alpha=moe.experts.alpha) if rank else shared  # pyright: ignore[reportAttributeAccessIssue]


def lora_layers(parts: LayerParts) -> Callable[[int], LoRALayer]:
    """Returns a function that makes an MoE layer with LoRA experts from the layer's index."""
    config, section, groups = parts.config, parts.config.model, parts.placement.groups
    context = router_context(config, groups)
    ffn_dim = groups[0].ffn_dim  # all groups have the same ffn_dim

    def make(layer: int) -> LoRALayer:
        return LoRALayer(
            norm=RMSNorm(section.hidden_dim, section.norm_eps),
            router=build_router(section, context, layer),
            ffn=SwiGLU(section.hidden_dim, ffn_dim),
            adapters=section.moe.experts.build(section.hidden_dim, ffn_dim, groups),
            recompute=config.parallel.recompute,
            seed=config.run.seed,
            layer=layer,
            comm_stats=parts.all_to_all.comm_stats,
        )

    return make


def make_layers(parts: LayerParts) -> Callable[[int], MoELayer | LoRALayer]:
    """Returns a function that makes the MoE layer of the configured kind from the layer's index."""
    return (lora_layers if parts.config.model.moe.experts.over_frozen_ffn else ffn_layers)(parts)


def attention_adapters(config: Config) -> Callable[[int], AttentionLoRA] | None:
    """Returns a function: layer index -> LoRA adapters of the layer's attention; None without `model.attention_lora`."""
    lora, widths = config.model.attention_lora, config.model.attention_widths
    if lora is None:
        return None
    targets = {target: widths[target] for target in lora.targets}
    fields = lora.model_dump(exclude={"targets"})
    return lambda layer: AttentionLoRA(targets, **fields, seed=config.run.seed, layer=layer)
