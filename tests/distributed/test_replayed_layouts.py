"""The bytes and drops computed from a trace equal exactly those of dispatchers on real ranks with the same layout, in
32 cases on 2 and 4 ranks."""

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
from moe_dist.moe.routers.capacity import capacity_of, over_capacity
from moe_dist.moe.routing.types import Assignments
from moe_dist.monitor.report.numbers import traffic
from moe_dist.monitor.report.replayed_counts import capped, without_nulls
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.worlds import RankContext

GROUPS = (ExpertGroup("text", 6, 4, 3, 8, 0, ("text",)), ExpertGroup("image", 4, 0, 2, 8, 6, ("image",)))
DIM, LENGTH, MICRO_BATCH = 6, 10, 2


class Case(NamedTuple):
    placement: str
    nulls: str
    factor: float | None
    kind: str


KINDS = ("all_to_all", "hierarchical")
CASES = [Case(*each) for each in itertools.product(("even", "uneven"), ("traced", "real"), (None, 0.7), KINDS)]


def placement_of(name: str, ranks: int) -> ExpertPlacement:
    if name == "even":
        return ExpertPlacement.interleaved(GROUPS, ranks)
    slots = [tuple(range(7)), (7, 8, 9), (), ()] if ranks == 4 else [(0,), tuple(range(1, 10))]
    return ExpertPlacement(GROUPS, tuple(slots))


def chosen(case: Case, ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the ids [T, 1, K], and each token's sequence and group, before a capacity drops any pair."""
    rng, tokens = np.random.default_rng(CASES.index(case)), ranks * MICRO_BATCH * LENGTH
    group_T = rng.integers(0, 2, tokens)
    ids = np.full((tokens, 1, 3), -1, np.int16)
    for t, group in enumerate(group_T.tolist()):
        columns = [*range(6), 10, 11, 12, 13] if group == 0 else [6, 7, 8, 9]
        ids[t, 0, : GROUPS[group].top_k] = rng.choice(columns, GROUPS[group].top_k, replace=False)
    if case.nulls == "real":
        ids = without_nulls(ids, group_T, GROUPS)
    return ids, np.arange(tokens) // LENGTH, group_T


def really_run(context: RankContext) -> list[tuple[int, int]]:
    """Returns, for each case, this rank's drops and its payload bytes of forward and backward. For hierarchical dispatch it
    counts only bytes between nodes."""
    node = max(1, context.world_size // 2)
    mesh = make_mesh(ep=context.world_size, device=torch.device("cpu"), timeout=600.0, ranks_per_node=node)
    found = []
    for case in CASES:
        ids, sequence_T, group_T = chosen(case, context.world_size)
        mine = sequence_T // MICRO_BATCH == context.rank
        expert_N = torch.from_numpy(ids[mine, 0].astype(np.int64)).flatten()
        expert_N = torch.where(expert_N >= 10, -1, expert_N)
        dropped = 0
        if case.factor is not None:
            tokens = torch.tensor([int((group_T[mine] == g).sum()) for g in (0, 1)])
            room_G = capacity_of(case.factor, tokens * torch.tensor([3, 2]), torch.tensor([10, 4]))
            room_E = room_G.repeat_interleave(torch.tensor([6, 4]))
            over_N = over_capacity(expert_N, torch.rand(len(expert_N)), room_E, "position")
            dropped, expert_N = int(over_N.sum()), torch.where(over_N, -1, expert_N)
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
        found.append((comm_stats.payload_bytes if flat else comm_stats.inter_node_bytes, dropped))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_and_drops_are_those_of_a_real_run(run_in_world: Callable[..., list[Any]], ranks: int) -> None:
    real = np.sum(run_in_world(ranks, really_run), axis=0).tolist()
    seen = set()
    for case, (payload, dropped) in zip(CASES, real, strict=True):
        ids, sequence_T, group_T = chosen(case, ranks)
        if case.factor is not None:
            ids = capped(ids, group_T, sequence_T // MICRO_BATCH, GROUPS, case.factor)
        node, placement = max(1, ranks // 2), placement_of(case.placement, ranks)
        counted = traffic(ids, sequence_T, placement, (node,), micro_batch=MICRO_BATCH)
        rows = counted.rows if case.kind == "all_to_all" else counted.between_hierarchical[node]
        assert (4 * 8 * DIM * rows, int((ids < -1).sum())) == (payload, dropped), case
        assert counted.between[node] >= counted.between_hierarchical[node]
        assert (dropped > 0) == (case.factor is not None)
        seen.add(payload)
    assert len(seen) > 6


def test_nulls_become_other_true_experts_of_the_group() -> None:
    case = CASES[0]
    before, _, group_T = chosen(case, 4)
    before[0, 0] = -2 - before[0, 0]  # a pair that is already dropped stays dropped
    after = without_nulls(before, group_T, GROUPS)
    for t, (old, new) in enumerate(zip(before[:, 0].tolist(), after[:, 0].tolist(), strict=True)):
        true = [e for e in new if e >= 0]
        assert len(set(true)) == len(true)
        assert all(e in GROUPS[group_T[t]].experts for e in true)
        assert all(n == o for o, n in zip(old, new, strict=True) if o < 10)
        assert not any(n >= 10 for n in new)
        assert t == 0 or len(true) == GROUPS[group_T[t]].top_k
    few = (ExpertGroup("text", 2, 5, 4, 8, 0, ("text",)),)
    ids = np.array([[[0, 3, 4, 5]]], np.int16)
    assert without_nulls(ids, np.zeros(1, int), few).tolist() == [[[0, 1, -1, -1]]]
