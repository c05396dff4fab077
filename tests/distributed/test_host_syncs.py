"""A whole MoE layer waits for the device once, in `dispatcher.plan`. Router, capacity, experts, zero-computation
experts and both exchanges never wait.

The test sorts pairs by counting, as on CUDA. If the layer ran on CUDA, the host would wait at each recorded read.
"""

from collections.abc import Callable
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.hierarchical_planning import SPLIT_SIZES as SPLIT_SIZES_OF_BOTH
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.dispatch.planning import SPLIT_SIZES
from moe_dist.moe.kernels import torch_kernels as rows
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.cover import full
from tests.support.one_rank_layer import one_rank_layer
from tests.support.syncs import host_syncs
from tests.support.worlds import RankContext

T, D = 20, 16
GROUPS = (
    ExpertGroup("text", 4, 2, 3, 8, 0, ("text",), num_identity=2, num_constant=2),
    ExpertGroup("image", 2, 1, 2, 8, 4, ("image",)),
)
PLACEMENTS = {1: ExpertPlacement(GROUPS, ((0, 1, 2, 3, 4, 5),)), 2: ExpertPlacement(GROUPS, ((0, 1, 4), (2, 3, 5)))}
TIMETABLES = {"plain": {}, "overlap": {"overlap": True}, "chunks": {"chunks": 3}, "both": {"overlap": True, "chunks": 2}}
# Half of the product's cases still cover all pairs of two axes' values, except pairs with the kind of GEMM.
CASES = list(product(("loop", "grouped"), (None, 5), ("none", "experts", "block"), (*TIMETABLES, "hierarchical")))[::2]


def capped_layer(drop: Any, dispatcher: Any, **options: Any) -> MoELayer:
    """Returns a layer with a capacity, a selection bias, a shared expert and experts without computation."""
    router = TopKRouter(RouterContext(D, GROUPS, capacity=Capacity(0.7, drop)), selection_bias=True)
    more = {"norm": torch.nn.RMSNorm(D), "shared": torch.nn.Linear(D, D), **options}
    return one_rank_layer(router, D, dispatcher=dispatcher, **more)


def layer_of(rank: RankContext, mesh: Mesh, comm_stats: CommStats, case: tuple[Any, ...]) -> MoELayer:
    gemm, budget, recompute, way = case
    placement, wire = PLACEMENTS[rank.world_size], AllToAll(mesh.ep, comm_stats)
    if way == "hierarchical":
        wires = AllToAll(mesh.inter_node, comm_stats), AllToAll(mesh.intra_node, comm_stats)
        dispatcher: Any = HierarchicalDispatcher(
            DispatchContext(placement, wires[0], hops=wires), ranks_per_node=rank.world_size
        )
    elif way == "plain":
        dispatcher = AllToAllDispatcher(DispatchContext(placement, wire))
    else:
        dispatcher = PipelinedDispatcher(DispatchContext(placement, wire), **TIMETABLES[way])
    options = {"placement": placement, "rank": rank.rank, "recompute": recompute, "gemm": gemm, "pair_budget": budget}
    return capped_layer("probability" if budget else "position", dispatcher, **options)


def syncs(rank: RankContext, cases: list[tuple[Any, ...]]) -> list[tuple[list[str], list[str]]]:
    """Returns, for each case, the named syncs and all reads of one forward and backward."""
    found = []
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0, ranks_per_node=rank.world_size)
    for case in cases:
        torch.manual_seed(rank.rank)
        comm_stats = CommStats(events=[])
        layer = layer_of(rank, mesh, comm_stats, case)
        x_TD, group_T = torch.randn(T, D, requires_grad=True), torch.randint(-1, 2, (T,))
        with mock.patch.object(rows, "_host_order", rows._device_order), host_syncs() as seen:
            y_TD, _ = layer(x_TD, group_T)
            y_TD.sum().backward()
        found.append(([event for event in comm_stats.events or [] if event.startswith("sync")], seen))
    return found


@pytest.mark.parametrize(("world_size", "every"), [full(1, 1), full(2, 1), (2, 2)])
def test_the_whole_layer_syncs_once_and_by_name(
    run_in_world: Callable[..., list[Any]], world_size: int, every: int
) -> None:
    """Half of all combinations are enough: each value still occurs with several values of each other axis."""
    cases = CASES[::every]
    for found in run_in_world(world_size, syncs, cases):
        for case, (named, seen) in zip(cases, found, strict=True):
            assert named == [f"sync {SPLIT_SIZES_OF_BOTH if 'hierarchical' in case else SPLIT_SIZES}"], case
            assert seen == ["tolist"], case
