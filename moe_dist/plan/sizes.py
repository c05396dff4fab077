"""Sizes of a run from its configuration, without torch."""

from collections.abc import Sequence
from typing import Any

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.config.tuning_rules import chosen_layers
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan import memory
from moe_dist.plan.flops import Adapters, Shape
from moe_dist.plan.policies import expert_groups


def model_shape(section: ModelSection, groups: Sequence[ExpertGroup]) -> Shape:
    """Sizes for counting parameters and FLOPs."""
    return Shape(
        hidden_dim=section.hidden_dim,
        num_layers=section.num_layers,
        num_moe_layers=len(section.moe_layers),
        num_heads=section.num_heads,
        num_kv_heads=section.num_kv_heads,
        head_dim=section.resolved_head_dim,
        vocab_size=section.vocab_size,
        dense_ffn_dim=section.dense_ffn_dim or 0,
        shared_ffn_dim=section.moe.shared_ffn_dim,
        shared_gate=section.moe.shared_gate,
        qk_norm=section.qk_norm,
        attention_bias=section.attention_bias,
        tie_embeddings=section.tie_embeddings,
        groups=groups,
        auxiliary_routers=section.moe.router.has_auxiliary_routers,
        single_null_row=section.moe.router.single_null_row,
        num_depth_layers=len(section.depth_layers),
        depth_capacity=1.0 if section.mixture_of_depths is None else section.mixture_of_depths.capacity,
        lora=_adapters(section.moe.experts if section.moe.experts.over_frozen_ffn else None),
        attention_lora=_adapters(section.attention_lora),
        depth_auxiliary=section.mixture_of_depths is not None and section.mixture_of_depths.causal == "auxiliary",
    )


def tuned_layers(config: Config) -> tuple[int, ...] | None:
    """The layers whose routers are trained, in a run that trains only routers; else None."""
    return None if config.router_tuning is None else chosen_layers(config.router_tuning, config.model.moe_layers)


def tuned_routers(config: Config) -> memory.Tuned | None:
    """Sizes of the trained routers, in a run that trains only routers; else None."""
    tuned = tuned_layers(config)
    if tuned is None:
        return None
    lowest = min(tuned)
    above = sum(layer >= lowest for layer in config.model.moe_layers)
    return memory.Tuned(len(tuned), config.model.num_layers - lowest, above)


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint, over all ranks."""
    shape = model_shape(config.model, expert_groups(config.model.moe))
    return round(memory.checkpoint_bytes(shape, tuned_routers(config)))


def _adapters(section: Any) -> Adapters | None:
    return None if section is None else Adapters(section.rank, section.targets)


def folder_bytes(config: Config) -> int:
    """Maximum disk space of a run's checkpoints: those that are kept, and the one being written."""
    return (config.checkpoint.keep + 1) * checkpoint_bytes(config)
