"""Makes the context from which the dispatcher of all MoE layers is made."""

import torch.distributed as dist

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.config.dispatchers.base import DispatchSection
from moe_dist.config.parallel.section import ParallelSection
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.placement.placement import ExpertPlacement

NodeGroups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]  # group between nodes, group inside this node


def dispatch_context(
    section: ParallelSection,
    placement: ExpertPlacement,
    all_to_all: AllToAll,
    hidden_dim: int,
    node_groups: NodeGroups = (None, None),
    kernels: RowKernels = TORCH,
    tokens: int = 0,
) -> DispatchContext:
    """Returns the arguments with which `section.dispatch` builds a dispatcher."""
    between, inside = (
        AllToAll(group, all_to_all.comm_stats, all_to_all.tracker, between_nodes=place == 0)
        for place, group in enumerate(node_groups)
    )
    return DispatchContext(
        placement,
        all_to_all,
        hidden_dim,
        max_receive_rows=section.max_receive_rows,
        kernels=kernels,
        tokens=tokens,
        hops=(between, inside),
        deterministic=section.deterministic,
        two_batches=section.two_batch_overlap,
    )


def dispatch_with(model: Transformer, section: DispatchSection, context: DispatchContext) -> None:
    """Replaces the dispatcher of all MoE layers, because the experts have a new placement."""
    dispatcher = section.build(context)
    for layer in model.moe_modules():
        layer.dispatcher = dispatcher  # pyright: ignore[reportArgumentType]: layers of LoRA experts have none
