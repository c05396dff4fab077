"""Makes all-to-alls over process groups, and the dispatcher that all MoE layers share, from the section `parallel`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.integrity import CheckedAllToAll
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.parallel.section import ParallelSection
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.deep_ep_v2 import DeepEPDispatcher
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.hybrid_ep import HybridEPDispatcher
from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher, KnownCountsFirst, pairs_are_rows
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.dispatch.static import StaticDispatcher
from moe_dist.moe.dispatch.static_planning import StaticRoom
from moe_dist.moe.dispatch.two_batches import TwoBatchDispatcher
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.planner import group_shares, reached

NodeGroups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]  # between nodes, inside this node
PLAIN = {"overlap": False, "chunks": 1}  # fields of `parallel.dispatch` that exchange all rows of a layer at once


def build_all_to_all(
    section: ParallelSection,
    group: dist.ProcessGroup | None,
    comm_stats: CommStats,
    tracker: CollectiveTracker | None,
    *,
    between_nodes: bool = False,
) -> AllToAll:
    """Makes the all-to-all of one process group. The all-to-all checks each exchange if `parallel.check_exchanges` is
    set."""
    all_to_all = AllToAll(group, comm_stats, tracker, between_nodes=between_nodes)
    return CheckedAllToAll(all_to_all) if section.check_exchanges else all_to_all


@dataclass(frozen=True)
class DispatchParts:
    """The values from which the functions of this file make a dispatcher."""

    parallel: ParallelSection
    placement: ExpertPlacement
    all_to_all: AllToAll  # all-to-all of the EP group
    hidden_dim: int
    node_groups: NodeGroups = (None, None)
    kernels: RowKernels = TORCH
    tokens: int = 0  # tokens of a rank's micro-batch

    @property
    def fields(self) -> dict[str, Any]:
        return self.parallel.dispatch.keywords()

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the dispatchers that exchange rows by all-to-alls."""
        return {"max_receive_rows": self.parallel.max_receive_rows, "kernels": self.kernels}


def build_dispatcher(parts: DispatchParts) -> Dispatcher[Any]:
    """Makes the dispatcher of all MoE layers. The fields of `parallel.dispatch` become keywords of the dispatcher's
    constructor."""
    return DISPATCHERS[parts.parallel.dispatch.kind](parts)


def _all_to_all(parts: DispatchParts) -> Dispatcher[Any]:
    """Makes the dispatcher for halves of a micro-batch if the option selects it. Otherwise makes the dispatcher with known
    counts if each sent row serves only one (token, expert) pair and no option selects the pipelined dispatcher, or a
    dispatcher of `_planned`."""
    if parts.parallel.two_batch_overlap:
        return TwoBatchDispatcher(parts.placement, parts.all_to_all, **parts.options)
    known = parts.fields == PLAIN and pairs_are_rows(parts.placement)
    return _known_counts(parts, always=False) if known else _planned(parts)


def _planned(parts: DispatchParts) -> PipelinedDispatcher | AllToAllDispatcher:
    """Makes the pipelined dispatcher if an option asks for it, or the plain one."""
    if parts.fields != PLAIN:
        return PipelinedDispatcher(parts.placement, parts.all_to_all, **parts.options, **parts.fields)
    return _general(parts)


def _general(parts: DispatchParts) -> AllToAllDispatcher:
    return AllToAllDispatcher(parts.placement, parts.all_to_all, **parts.options)


def _hierarchical(parts: DispatchParts) -> HierarchicalDispatcher:
    comm_stats, tracker = parts.all_to_all.comm_stats, parts.all_to_all.tracker
    between, inside = (
        build_all_to_all(parts.parallel, group, comm_stats, tracker, between_nodes=i == 0)
        for i, group in enumerate(parts.node_groups)
    )
    return HierarchicalDispatcher(parts.placement, between, inside, **parts.options, **parts.fields)


def _known_counts(parts: DispatchParts, *, always: bool = True) -> KnownCountsFirst:
    """Makes the dispatcher with known counts. This dispatcher serves batches for which the router knows the number of
    (token, expert) pairs per rank and expert without an exchange. All other batches (as in evaluation, where tokens choose
    experts) use the plain dispatcher. With `always`, known counts are used even if a rank holds several experts of a
    group."""
    known = KnownCountsDispatcher(parts.placement, parts.all_to_all, **parts.options)
    return KnownCountsFirst(known, _general(parts), always=always)


def _deep_ep_v2(parts: DispatchParts) -> DeepEPDispatcher:
    top_k = max(group.top_k for group in parts.placement.groups)  # the largest top_k of all groups
    own: dict[str, Any] = {"hidden_dim": parts.hidden_dim, "deterministic": parts.parallel.deterministic}
    return DeepEPDispatcher(parts.placement, parts.all_to_all, top_k=top_k, **own, **parts.fields)


def _static(parts: DispatchParts) -> StaticDispatcher:
    room = room_for(parts.placement, parts.tokens, **parts.fields)
    return StaticDispatcher(parts.placement, parts.all_to_all, room=room, kernels=parts.kernels)


def room_for(placement: ExpertPlacement, tokens: int, *, room: float) -> StaticRoom:
    """Returns the fixed sizes of exchange buffers, in rows and (token, expert) pairs: `room` times the numbers expected for
    `tokens` tokens of each rank, but at most the largest possible numbers."""
    groups, ep = placement.groups, placement.num_ranks
    rows, pairs, computed = [], [], []
    for rank in range(ep):
        held_G = [len(placement.local_experts(rank, group)) for group in groups]
        groups_of = list(zip(groups, group_shares(groups, {}), held_G, strict=True))
        expected = sum(share * reached(group, held) for group, share, held in groups_of)
        pairs_G = [share * group.expected_experts_per_token * held / group.num_experts for group, share, held in groups_of]
        most_G = [min(group.top_k, held) for group, _, held in groups_of]
        rows.append(min(tokens, math.ceil(room * tokens * expected)))
        pairs.append(min(tokens * max(most_G), math.ceil(room * tokens * sum(pairs_G))))
        of_groups = zip(pairs_G, most_G, strict=True)
        computed.append(tuple(min(ep * tokens * most, math.ceil(room * ep * tokens * each)) for each, most in of_groups))
    return StaticRoom(tuple(rows), tuple(pairs), tuple(computed))


DISPATCHERS: dict[str, Callable[[DispatchParts], Dispatcher[Any]]] = {
    "all_to_all": _all_to_all,
    "hierarchical": _hierarchical,
    "known_counts": _known_counts,
    "static": _static,
    "deep_ep_v2": _deep_ep_v2,
    "hybrid_ep": lambda parts: HybridEPDispatcher(
        parts.placement, parts.all_to_all, hidden_dim=parts.hidden_dim, **parts.fields
    ),
}
# Those whose plans all come from their attribute `planner`, by the kinds for which the configuration allows replicas.
WITH_PLANNER: dict[str, Callable[[DispatchParts], Any]] = {"all_to_all": _planned, "hierarchical": _hierarchical}


def dispatch_with(model: Transformer, parts: DispatchParts) -> None:
    """Gives all MoE layers a new dispatcher, for another placement of the experts."""
    dispatcher = build_dispatcher(parts)
    for layer in model.moe_modules():
        layer.dispatcher = dispatcher  # pyright: ignore[reportArgumentType]: layers of LoRA experts have none
