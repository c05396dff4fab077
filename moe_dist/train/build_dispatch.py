"""Turns the section `parallel` into what carries rows: wires over process groups, and the dispatcher of all layers."""

from typing import Any

import torch.distributed as dist

from moe_dist.comm.all_to_all import Wire
from moe_dist.comm.integrity import CheckedWire
from moe_dist.comm.traffic import Traffic
from moe_dist.comm.watch import Watch
from moe_dist.config.parallel_schema import ParallelSection
from moe_dist.moe.dispatch.all_to_all import PerRankDispatcher
from moe_dist.moe.dispatch.deep_ep import DeepEPDispatcher
from moe_dist.moe.dispatch.hierarchical import PerNodeDispatcher
from moe_dist.moe.dispatch.hybrid_ep import HybridEPDispatcher
from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.dispatch.known_counts import PerPairDispatcher, SyncFreeDispatcher, pairs_are_rows
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.placement.placement import ExpertPlacement

NodeGroups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]  # between nodes, inside the node


def build_wire(
    section: ParallelSection,
    group: dist.ProcessGroup | None,
    traffic: Traffic,
    watch: Watch | None,
    *,
    between_nodes: bool = False,
) -> Wire:
    """One process group as a wire, checked where the configuration says so."""
    wire = Wire(group, traffic, watch, between_nodes=between_nodes)
    return CheckedWire(wire) if section.check_exchanges else wire


def build_dispatcher(
    parallel: ParallelSection,
    placement: ExpertPlacement,
    wire: Wire,
    *,
    hidden_dim: int,
    node_groups: NodeGroups = (None, None),
) -> Dispatcher[Any] | PipelinedDispatcher:
    """The dispatcher of all layers; the fields of `parallel.dispatch` are its constructor's keywords."""
    section, bound = parallel.dispatch, parallel.max_receive_rows
    fields = section.model_dump(exclude={"kind"})
    if section.kind == "per_node":
        between, inside = (
            build_wire(parallel, group, wire.traffic, wire.watch, between_nodes=i == 0)
            for i, group in enumerate(node_groups)
        )
        return PerNodeDispatcher(placement, between, inside, max_receive_rows=bound, **fields)
    if section.kind == "deep_ep":
        top_k = max(group.top_k for group in placement.groups)
        return DeepEPDispatcher(placement, wire, hidden_dim=hidden_dim, top_k=top_k, **fields)
    if section.kind == "hybrid_ep":
        return HybridEPDispatcher(placement, wire, hidden_dim=hidden_dim, **fields)
    pairs = PerPairDispatcher(placement, wire, max_receive_rows=bound)
    if section.kind == "per_pair":  # evaluation routes each token by itself: then the counts are not known
        return SyncFreeDispatcher(PerRankDispatcher(placement, wire, max_receive_rows=bound), pairs, always=True)
    per_rank = _per_rank(placement, wire, max_receive_rows=bound, **fields)
    if isinstance(per_rank, PipelinedDispatcher) or not pairs_are_rows(placement):
        return per_rank
    return SyncFreeDispatcher(per_rank, pairs)


def _per_rank(
    placement: ExpertPlacement, wire: Wire, *, max_receive_rows: int | None, overlap: bool, chunks: int
) -> PerRankDispatcher | PipelinedDispatcher:
    """The plain dispatcher, unless a timetable is asked for."""
    if not overlap and chunks == 1:
        return PerRankDispatcher(placement, wire, max_receive_rows=max_receive_rows)
    return PipelinedDispatcher(placement, wire, max_receive_rows=max_receive_rows, overlap=overlap, chunks=chunks)
