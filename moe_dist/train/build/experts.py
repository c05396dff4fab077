"""Makes MoE layers and the attention's LoRA adapters from the configuration."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.model.layers import GatedSwiGLU, RMSNorm, SwiGLU
from moe_dist.model.shared_lora import adapted
from moe_dist.moe.experts.experts import Experts, on_host
from moe_dist.moe.experts.lora import LoRALayer
from moe_dist.moe.experts.static_storage import on_device
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts, has_zero_computation_experts
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.dispatch import NodeGroups, dispatch_context
from moe_dist.train.build.routing import build_router, router_context


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
    """Returns a function: layer index -> LoRA adapters of the layer's attention. Without `model.attention_lora` None."""
    lora, widths = config.model.attention_lora, config.model.attention_widths
    if lora is None:
        return None
    targets = {target: widths[target] for target in lora.targets}
    fields = lora.model_dump(exclude={"targets"})
    return lambda layer: AttentionLoRA(targets, **fields, seed=config.run.seed, layer=layer)
