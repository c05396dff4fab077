"""Turns the sections of adapters into objects: LoRA experts over a frozen FFN, and LoRA on the attention."""

from collections.abc import Callable, Sequence

from torch import nn

from moe_dist.comm.collectives import CommStats
from moe_dist.config.lora_schema import LoRAExpertsSection
from moe_dist.config.schema import Config
from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.model.layers import RMSNorm, SwiGLU
from moe_dist.moe.lora import LoRAExperts, LoRALayer
from moe_dist.placement.placement import ExpertGroup


def lora_layers(
    config: Config, groups: Sequence[ExpertGroup], comm_stats: CommStats, make_router: Callable[[], nn.Module]
) -> Callable[[int], LoRALayer]:
    """Makes a layer of LoRA experts; the section's fields are `LoRAExperts`'s keywords."""
    section, experts = config.model, config.model.moe.experts
    assert isinstance(experts, LoRAExpertsSection)
    fields, ffn_dim = experts.model_dump(exclude={"kind"}), groups[0].ffn_dim  # all groups have the same

    def make(layer: int) -> LoRALayer:
        return LoRALayer(
            norm=RMSNorm(section.hidden_dim, section.norm_eps),
            router=make_router(),
            ffn=SwiGLU(section.hidden_dim, ffn_dim),
            adapters=LoRAExperts(section.hidden_dim, ffn_dim, groups, **fields),
            recompute=config.parallel.recompute,
            seed=config.run.seed,
            layer=layer,
            comm_stats=comm_stats,
        )

    return make


def attention_adapters(config: Config) -> Callable[[int], AttentionLoRA] | None:
    """Makes the adapters of a layer's attention; None without any. The section's other fields are the keywords."""
    section, lora = config.model, config.model.attention_lora
    if lora is None:
        return None
    dim, heads, kv_heads = (
        section.hidden_dim, section.num_heads * section.resolved_head_dim, section.num_kv_heads * section.resolved_head_dim
    )  # fmt: skip
    widths = {"q": (dim, heads), "k": (dim, kv_heads), "v": (dim, kv_heads), "o": (heads, dim)}
    targets = {target: widths[target] for target in lora.targets}
    fields = lora.model_dump(exclude={"targets"})
    return lambda layer: AttentionLoRA(targets, **fields, seed=config.run.seed, layer=layer)
