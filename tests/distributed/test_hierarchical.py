"""Hierarchical dispatch has the oracle's values and gradients, the bytes of a closed form in both hops, and one host
sync."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.hierarchical_planning import SPLIT_SIZES
from moe_dist.moe.routing.types import ABSENT
from moe_dist.parallel.mesh import make_mesh
from tests.reference.layer import expected_node_traffic
from tests.support.cover import full
from tests.support.routings import Case, D, random_case, round_trip
from tests.support.worlds import RankContext

PLAN = ["inter-node counts", "intra-node counts", "sync split sizes of both hops", "inter-node expert ids",
        "intra-node expert ids"]  # fmt: skip
FORWARD = ["inter-node dispatch weights", "inter-node dispatch rows", "intra-node dispatch weights",
           "intra-node dispatch rows", "intra-node combine rows", "inter-node combine rows"]  # fmt: skip
BACKWARD = ["inter-node combine rows backward", "intra-node combine rows backward",
            "intra-node dispatch weights backward", "intra-node dispatch rows backward",
            "inter-node dispatch weights backward", "inter-node dispatch rows backward"]  # fmt: skip


def make(world_size: int, per_node: int) -> tuple[Callable[[Case], HierarchicalDispatcher], CommStats]:
    mesh = make_mesh(ep=world_size, device=torch.device("cpu"), timeout=600.0, ranks_per_node=per_node)
    comm_stats = CommStats(events=[])
    inter, intra = AllToAll(mesh.inter_node, comm_stats), AllToAll(mesh.intra_node, comm_stats)

    def make(case: Case) -> HierarchicalDispatcher:
        context = DispatchContext(case.placement, inter, hops=(inter, intra))
        return HierarchicalDispatcher(context, ranks_per_node=per_node)

    return make, comm_stats


def run_cases(rank: RankContext, per_node: int, seeds: range) -> int:
    """Compares random cases with the oracle, and the bytes of both hops with their closed forms."""
    dispatcher_of, comm_stats = make(rank.world_size, per_node)
    for seed in seeds:
        case = random_case(seed, rank.world_size)
        num_tokens = len(case.experts_TK[rank.rank])
        assignments = case.assignments(rank.rank, torch.empty(case.experts_TK[rank.rank].size))
        trip = round_trip(
            dispatcher_of(case), assignments, case.placement, rank.rank, num_tokens, comm_stats=comm_stats, seed=seed
        )
        taken = [case.taken(each) for each in range(rank.world_size)]
        sent = [
            expected_node_traffic(
                [tokens for tokens, _ in taken],
                [experts for _, experts in taken],
                case.placement.rank_of_expert,
                ranks_per_node=per_node,
                own_rank=each,
            )
            for each in range(rank.world_size)
        ]
        plan, (crossing, inside) = trip.plan, sent[rank.rank]
        assert (sum(plan.inter.rows.send), sum(plan.intra.rows.send)) == (crossing, inside)
        received = sum(plan.inter.rows.receive) + sum(plan.intra.rows.receive)
        assert trip.forward_bytes == (crossing + inside + received) * D * 8
        assert trip.total_bytes == 2 * trip.forward_bytes
        _, experts = taken[rank.rank]
        assert plan.sent.pairs == len(experts)
        assert plan.sent.pairs_remote == sum(case.placement.rank_of_expert[e] != rank.rank for e in experts)
        missing = {"inter-node": per_node == rank.world_size, "intra-node": per_node == 1}
        wanted = [e for e in PLAN + FORWARD + BACKWARD if not missing.get(e.partition(" ")[0])]
        assert [event for event in comm_stats.events if not event.startswith("wait ")] == wanted
    return len(seeds)


@pytest.mark.parametrize(
    ("world_size", "per_node", "seeds"),
    [
        (1, 1, range(20)), (2, 1, range(40)), full(2, 2, range(40)), (4, 2, range(50)), full(4, 2, range(50, 100)),
        full(4, 1, range(30)), full(4, 4, range(30)),
    ],
    ids=str,
)  # fmt: skip
def test_both_hops_equal_their_closed_forms_on_random_routings(
    run_in_world: Callable[..., list[Any]], world_size: int, per_node: int, seeds: range
) -> None:
    """The cases include ranks without tokens or experts, batches of only null choices, an expert that takes all tokens,
    nodes of one rank, and a single node."""
    cases = [random_case(seed, world_size) for seed in seeds]
    assert any(all((c == ABSENT).all() for c in case.experts_TK) for case in cases)
    assert any(case.experts_TK[0].shape[0] == 0 for case in cases)
    if world_size > 1:
        assert any(() in case.slots for case in cases)
    assert run_in_world(world_size, run_cases, per_node, seeds) == [len(seeds)] * world_size


#   two nodes of two ranks; rank 0 holds experts 0 1, rank 1 holds 2, rank 2 holds 3, rank 3 holds 4 5
#
#   rank 0   token 0 -> 3 4 5    ONE row between nodes, to rank 2 (its place there); rank 2 keeps a row and passes one to 3
#            token 1 -> 0 2      nothing between nodes; an own row, and a row to rank 1
#   rank 1   token 0 -> 4        a row to rank 3, which keeps it
#   rank 2   no token
#   rank 3   token 0 -> 2 0      ONE row to rank 1, which keeps a row and passes one to rank 0
HAND = Case(
    slots=((0, 1), (2,), (3,), (4, 5)),
    experts_TK=(
        np.array([[3, 4, 5], [0, 2, ABSENT]]),
        np.array([[4]]),
        np.zeros((0, 1), np.int64),
        np.array([[2, 0]]),
    ),
)


def plan_of_hand_case(rank: RankContext) -> dict[str, Any]:
    dispatcher_of, comm_stats = make(4, 2)
    chosen = HAND.experts_TK[rank.rank]
    plan = dispatcher_of(HAND).plan(HAND.assignments(rank.rank, torch.ones(chosen.size)), len(chosen))
    return {
        "between": plan.inter.rows.send,
        "inside": plan.intra.rows.send,
        "stays": (plan.inter.row_O.tolist(), plan.intra.row_O.tolist()),
        "rows by slot": plan.row_of_pair_Q.tolist(),
        "slots": plan.slot_counts,
        "syncs": [event for event in comm_stats.events if event.startswith("sync")],
    }


def test_the_case_drawn_by_hand(run_in_world: Callable[..., list[Any]]) -> None:
    seen = run_in_world(4, plan_of_hand_case)
    assert [each.pop("syncs") for each in seen] == [[f"sync {SPLIT_SIZES}"]] * 4
    # Rank 0 forwards its own token 1, and keeps its row for expert 0. Rank 1 forwards rank 3's token to rank 0.
    assert seen == [
        {"between": (0, 1), "inside": (0, 1), "stays": ([1], [0]), "rows by slot": [0, 1], "slots": (2, 0)},
        {"between": (0, 1), "inside": (1, 0), "stays": ([], [0]), "rows by slot": [0, 1], "slots": (2,)},
        {"between": (0, 0), "inside": (0, 1), "stays": ([], [0]), "rows by slot": [0], "slots": (1,)},
        {"between": (1, 0), "inside": (0, 0), "stays": ([], [0]), "rows by slot": [0, 1, 1], "slots": (2, 1)},
    ]


def roundings(rank: RankContext, per_node: int) -> tuple[float, float]:
    """Combines bf16 rows. Each token takes experts on all ranks. Experts of rank 0 return 1; all others return 1/256."""
    dispatcher_of, comm_stats = make(4, per_node)
    every = np.tile(np.arange(8), (64, 1))
    case = Case(((0, 1), (2, 3), (4, 5), (6, 7)), (every, every, every, every))
    assignments = case.assignments(rank.rank, torch.empty(every.size))
    dispatcher = dispatcher_of(case)
    weight_N = torch.rand(every.size, generator=torch.Generator().manual_seed(rank.rank))
    plan = dispatcher.plan(assignments, 64)
    got = dispatcher.dispatch(torch.ones(64, D, dtype=torch.bfloat16), weight_N, plan)
    assert got.rows_RD.dtype == torch.bfloat16
    assert got.weight_Q.dtype == torch.float32
    y_TD = dispatcher.combine(got.rows_RD * (1.0 if rank.rank == 0 else 1 / 256), plan)
    assert y_TD.dtype == torch.bfloat16
    hops = (plan.inter.rows, plan.intra.rows)
    assert comm_stats.payload_bytes == sum(sum(rows.send) + sum(rows.receive) for rows in hops) * D * 2
    return float(y_TD.min()), float(y_TD.max())


# The exact sum 1 + 3/256 lies halfway between the bf16 numbers 1 + 1/128 and 1 + 2/128, and rounds to 1 + 2/128. A sum
# in bf16 would stay at 1. With two nodes, each node first rounds its own sum: 1 + 1/256 becomes 1, and 2/256 stays.
@pytest.mark.parametrize(("per_node", "rounded"), [(1, 1 + 2 / 128), (2, 1 + 1 / 128), (4, 1 + 2 / 128)])
def test_rows_travel_in_bf16_and_are_summed_in_fp32(
    run_in_world: Callable[..., list[Any]], per_node: int, rounded: float
) -> None:
    assert run_in_world(4, roundings, per_node) == [(rounded, rounded)] * 4
