"""The only place that turns configuration sections into objects."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.comm.all_to_all import Wire
from moe_dist.comm.traffic import Traffic
from moe_dist.config.schema import Config, ModelSection, TopKRouterSection
from moe_dist.model.layers import RMSNorm, SwiGLU
from moe_dist.model.transformer import ModelArgs, Transformer
from moe_dist.moe.dispatcher import Dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_router(section: TopKRouterSection, hidden_dim: int, groups: Sequence[ExpertGroup]) -> nn.Module:
    """The router of one layer; a section's fields are its constructor's keywords."""
    kinds = {"top_k": TopKRouter}
    fields = section.model_dump(exclude={"kind"})
    return kinds[section.kind](hidden_dim, groups, **fields)


def model_args(section: ModelSection, *, compute_dtype: torch.dtype, recompute_blocks: bool) -> ModelArgs:
    """Plain sizes of the transformer."""
    return ModelArgs(
        vocab_size=section.vocab_size,
        hidden_dim=section.hidden_dim,
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        num_kv_heads=section.num_kv_heads,
        head_dim=section.resolved_head_dim,
        moe_layers=section.moe_layers,
        dense_ffn_dim=section.dense_ffn_dim,
        rope_base=section.rope_base,
        norm_eps=section.norm_eps,
        qk_norm=section.qk_norm,
        tie_embeddings=section.tie_embeddings,
        compute_dtype=compute_dtype,
        recompute_blocks=recompute_blocks,
    )


def build_model(
    config: Config,
    placement: ExpertPlacement,
    *,
    ep_rank: int,
    ep_group: dist.ProcessGroup | None,
    traffic: Traffic | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Transformer:
    """The transformer with this rank's experts, on the default device (the meta device for a dry run or before sharding).

    Args:
        placement: Which expert lives on which rank; without an `ep_group` it must not need the wire.
        traffic: Counter of all layers' wires.
        compute_dtype: Instead of `parallel.precision`, for tests in float64.
    """
    section, moe = config.model, config.model.moe
    wire = Wire(ep_group, traffic or Traffic())
    # A dry run has the placement of many ranks and no group: it builds the experts of `ep_rank` and never dispatches.
    dispatcher = Dispatcher(placement, wire, max_receive_rows=config.parallel.max_receive_rows)

    def make_moe(_layer: int) -> MoELayer:
        return MoELayer(
            norm=RMSNorm(section.hidden_dim, section.norm_eps),
            router=build_router(moe.router, section.hidden_dim, placement.groups),
            experts=Experts(
                section.hidden_dim,
                placement.groups,
                [len(placement.local_experts(ep_rank, group)) for group in placement.groups],
                row_budget=config.parallel.expert_row_budget,
            ),
            dispatcher=dispatcher,
            shared=SwiGLU(section.hidden_dim, moe.shared_ffn_dim) if moe.shared_ffn_dim else None,
            recompute=config.parallel.recompute,
        )

    dtype = compute_dtype or COMPUTE_DTYPES[config.parallel.precision]
    args = model_args(section, compute_dtype=dtype, recompute_blocks=config.parallel.recompute == "block")
    return Transformer(args, make_moe)
