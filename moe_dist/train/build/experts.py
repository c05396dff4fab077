"""Makes MoE layers from the configuration, by one function per kind of experts, and LoRA adapters of the attention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.ffn_lora import AdaptedFFNExpertsSection
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.model.layers import GatedSwiGLU, RMSNorm, SwiGLU
from moe_dist.model.shared_lora import adapted
from moe_dist.moe.experts.activations import SWIGLU, Activation
from moe_dist.moe.experts.clamped_swiglu import ClampedSwiGLU
from moe_dist.moe.experts.expert_lora import ExpertLoRA
from moe_dist.moe.experts.experts import Experts, on_host
from moe_dist.moe.experts.lora import LoRAExperts, LoRALayer
from moe_dist.moe.experts.static_storage import on_device
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts, has_zero_computation_experts
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.dispatch import DispatchParts, NodeGroups, build_dispatcher
from moe_dist.train.build.routing import build_router


@dataclass(frozen=True)
class LayerParts:
    """The values from which the functions of this file make MoE layers."""

    config: Config
    placement: ExpertPlacement
    ep_rank: int
    all_to_all: AllToAll  # all-to-all of the EP group
    node_groups: NodeGroups
    choice_scope: SelectionScope | None  # with expert choice: ranks whose tokens compete for an expert
    kernels: RowKernels = TORCH


def ffn_layers(parts: LayerParts, activation: Activation = SWIGLU) -> Callable[[int], MoELayer]:
    """Returns a function that makes the MoE layer with a given index, with FFN experts."""
    config, groups, all_to_all = parts.config, parts.placement.groups, parts.all_to_all
    section, moe, hidden_dim = config.model, config.model.moe, config.model.hidden_dim
    # A dry run makes layers for a placement on many ranks without a process group, because it never runs the layers.
    dispatcher = build_dispatcher(  # one dispatcher for all layers, because it may allocate large buffers
        DispatchParts(
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
    make_router = partial(
        build_router,
        moe.router,
        hidden_dim,
        groups,
        capacity=None if moe.capacity is None else Capacity(**moe.capacity.model_dump()),
        selection_scope=selection_scope,
        seed=config.run.seed,
        known_counts=known_counts,
        kernels=parts.kernels,
    )

    def make(layer: int) -> MoELayer:
        return MoELayer(
            norm=RMSNorm(hidden_dim, section.norm_eps),
            router=make_router(layer=layer, place=section.moe_layers.index(layer)),
            experts=Experts(
                hidden_dim,
                groups,
                [len(parts.placement.local_experts(parts.ep_rank, group)) for group in groups],
                activation=activation,
                adapter=_adapter(moe.experts),
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


def clamped_layers(parts: LayerParts) -> Callable[[int], MoELayer]:
    """Returns a function that makes the MoE layer with a given index, with the experts of gpt-oss."""
    section: Any = parts.config.model.moe.experts
    form = section.base if section.adapts_ffns else section
    return ffn_layers(parts, ClampedSwiGLU(form.alpha, form.limit))


def _adapter(section: ExpertsSection) -> ExpertLoRA | None:
    if not isinstance(section, AdaptedFFNExpertsSection):
        return None
    return ExpertLoRA(section.rank, section.alpha, section.targets, section.shared)


def _shared_expert(section: ModelSection) -> SwiGLU:
    moe = section.moe
    shared = (GatedSwiGLU if moe.shared_gate else SwiGLU)(section.hidden_dim, moe.shared_ffn_dim)
    if not (isinstance(moe.experts, AdaptedFFNExpertsSection) and moe.experts.shared_expert):
        return shared
    return adapted(shared, rank=moe.experts.rank, alpha=moe.experts.alpha)


def lora_layers(parts: LayerParts) -> Callable[[int], LoRALayer]:
    """Returns a function that makes the MoE layer with a given index, with LoRA experts."""
    config, section, groups = parts.config, parts.config.model, parts.placement.groups
    fields, ffn_dim = section.moe.experts.model_dump(exclude={"kind"}), groups[0].ffn_dim  # groups have the same ffn_dim

    def make(layer: int) -> LoRALayer:
        return LoRALayer(
            norm=RMSNorm(section.hidden_dim, section.norm_eps),
            router=build_router(section.moe.router, section.hidden_dim, groups),
            ffn=SwiGLU(section.hidden_dim, ffn_dim),
            adapters=LoRAExperts(section.hidden_dim, ffn_dim, groups, **fields),
            recompute=config.parallel.recompute,
            seed=config.run.seed,
            layer=layer,
            comm_stats=parts.all_to_all.comm_stats,
        )

    return make


EXPERTS: dict[str, Callable[[LayerParts], Callable[[int], MoELayer | LoRALayer]]] = {
    "ffn": ffn_layers,
    "ffn_lora": ffn_layers,
    "clamped_ffn": clamped_layers,
    "clamped_ffn_lora": clamped_layers,
    "lora": lora_layers,
}


def attention_adapters(config: Config) -> Callable[[int], AttentionLoRA] | None:
    """Returns a function: layer index -> LoRA adapters of that layer's attention. None without `model.attention_lora`."""
    lora, widths = config.model.attention_lora, config.model.attention_widths
    if lora is None:
        return None
    targets = {target: widths[target] for target in lora.targets}
    fields = lora.model_dump(exclude={"targets"})
    return lambda layer: AttentionLoRA(targets, **fields, seed=config.run.seed, layer=layer)
