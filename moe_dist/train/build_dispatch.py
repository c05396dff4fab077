"""Turns the section `parallel` into what carries rows: wires over process groups, and the dispatcher of all layers."""

from typing import Any

import torch.distributed as dist

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.integrity import CheckedAllToAll
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.parallel_schema import ParallelSection
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.deep_ep import DeepEPDispatcher
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.hybrid_ep import HybridEPDispatcher
from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher, KnownCountsFirst, pairs_are_rows
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.placement.placement import ExpertPlacement

NodeGroups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]  # between nodes, inside the node


def build_all_to_all(
    section: ParallelSection,
    group: dist.ProcessGroup | None,
    comm_stats: CommStats,
    tracker: CollectiveTracker | None,
    *,
    between_nodes: bool = False,
) -> AllToAll:
    """One process group as a wire, checked where the configuration says so."""
    wire = AllToAll(group, comm_stats, tracker, between_nodes=between_nodes)
    return CheckedAllToAll(wire) if section.check_exchanges else wire


def build_dispatcher(
    parallel: ParallelSection,
    placement: ExpertPlacement,
    wire: AllToAll,
    *,
    hidden_dim: int,
    node_groups: NodeGroups = (None, None),
) -> Dispatcher[Any]:
    """The dispatcher of all layers; the fields of `parallel.dispatch` are its constructor's keywords."""
    section, bound = parallel.dispatch, parallel.max_receive_rows
    fields = section.model_dump(exclude={"kind"})
    if section.kind == "hierarchical":
        between, inside = (
            build_all_to_all(parallel, group, wire.comm_stats, wire.tracker, between_nodes=i == 0)
            for i, group in enumerate(node_groups)
        )
        return HierarchicalDispatcher(placement, between, inside, max_receive_rows=bound, **fields)
    if section.kind == "deep_ep":
        top_k = max(group.top_k for group in placement.groups)
        return DeepEPDispatcher(placement, wire, hidden_dim=hidden_dim, top_k=top_k, **fields)
    if section.kind == "hybrid_ep":
        return HybridEPDispatcher(placement, wire, hidden_dim=hidden_dim, **fields)
    if section.kind == "all_to_all" and (section.overlap or section.chunks > 1):
        return PipelinedDispatcher(placement, wire, max_receive_rows=bound, **fields)
    known = KnownCountsDispatcher(placement, wire, max_receive_rows=bound)
    # Evaluation routes each token by itself: then the counts are not known.
    general = AllToAllDispatcher(placement, wire, max_receive_rows=bound)
    if section.kind == "known_counts":
        return KnownCountsFirst(known, general, always=True)
    return KnownCountsFirst(known, general) if pairs_are_rows(placement) else general
