"""The bytes computed from a trace equal the bytes that dispatchers with the same layout send, in 8 cases on 2 and 4
ranks."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.routing.types import Assignments
from moe_dist.monitor.report.numbers import traffic
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.worlds import RankContext

GROUPS = (ExpertGroup("text", 6, 4, 3, 8, 0, ("text",)), ExpertGroup("image", 4, 0, 2, 8, 6, ("image",)))
DIM, LENGTH, MICRO_BATCH = 6, 10, 2


class Case(NamedTuple):
    placement: str
    kind: str


KINDS = ("all_to_all", "hierarchical")
CASES = [Case(*each) for each in itertools.product(("even", "uneven"), KINDS)]


def placement_of(name: str, ranks: int) -> ExpertPlacement:
    if name == "even":
        return ExpertPlacement.interleaved(GROUPS, ranks)
    slots = [tuple(range(7)), (7, 8, 9), (), ()] if ranks == 4 else [(0,), tuple(range(1, 10))]
    return ExpertPlacement(GROUPS, tuple(slots))


def chosen(case: Case, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [T, 1, K], and each token's sequence."""
    rng, tokens = np.random.default_rng(CASES.index(case)), ranks * MICRO_BATCH * LENGTH
    group_T = rng.integers(0, 2, tokens)
    ids = np.full((tokens, 1, 3), -1, np.int16)
    for t, group in enumerate(group_T.tolist()):
        columns = [*range(6), 10, 11, 12, 13] if group == 0 else [6, 7, 8, 9]
        ids[t, 0, : GROUPS[group].top_k] = rng.choice(columns, GROUPS[group].top_k, replace=False)
    return ids, np.arange(tokens) // LENGTH


def really_run(context: RankContext) -> list[int]:
    """Returns, for each case, this rank's payload bytes of forward and backward. For hierarchical dispatch it counts only
    bytes between nodes."""
    node = max(1, context.world_size // 2)
    mesh = make_mesh(ep=context.world_size, device=torch.device("cpu"), timeout=600.0, ranks_per_node=node)
    found = []
    for case in CASES:
        ids, sequence_T = chosen(case, context.world_size)
        mine = sequence_T // MICRO_BATCH == context.rank
        expert_N = torch.from_numpy(ids[mine, 0].astype(np.int64)).flatten()
        expert_N = torch.where(expert_N >= 10, -1, expert_N)
        comm_stats, placement = CommStats(), placement_of(case.placement, context.world_size)
        num_tokens = int(mine.sum())
        token_N = torch.arange(num_tokens).repeat_interleave(3)
        h_TD = torch.ones(num_tokens, DIM, dtype=torch.double, requires_grad=True)
        weight_N = torch.ones(len(token_N))
        flat = case.kind == "all_to_all"
        dispatcher: Any = AllToAllDispatcher(DispatchContext(placement, AllToAll(mesh.ep, comm_stats)))
        if not flat:
            hops = AllToAll(mesh.inter_node, comm_stats, between_nodes=True), AllToAll(mesh.intra_node, comm_stats)
            dispatcher = HierarchicalDispatcher(DispatchContext(placement, hops[0], hops=hops), ranks_per_node=node)
        plan = dispatcher.plan(Assignments(token_N, expert_N, weight_N), num_tokens)
        rows = dispatcher.dispatch(h_TD, weight_N, plan)
        dispatcher.combine(rows.rows_RD, plan).sum().backward()
        found.append(comm_stats.payload_bytes if flat else comm_stats.inter_node_bytes)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_a_real_run(run_in_world: Callable[..., list[Any]], ranks: int) -> None:
    real = np.sum(run_in_world(ranks, really_run), axis=0).tolist()
    seen = set()
    for case, payload in zip(CASES, real, strict=True):
        ids, sequence_T = chosen(case, ranks)
        node, placement = max(1, ranks // 2), placement_of(case.placement, ranks)
        counted = traffic(ids, sequence_T, placement, (node,), micro_batch=MICRO_BATCH)
        rows = counted.rows if case.kind == "all_to_all" else counted.between_hierarchical[node]
        assert 4 * 8 * DIM * rows == payload, case
        assert counted.between[node] >= counted.between_hierarchical[node]
        seen.add(payload)
    assert len(seen) > 2
