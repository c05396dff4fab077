"""On real ranks dispatch and combine give the right values and gradients. The ledger counts exactly the rows, pairs and
bytes that follow from the routing (`expected_traffic`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import DISPATCH_ROWS
from moe_dist.errors import ResourceError
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.choice import all_to_all
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.dispatch.planning import SPLIT_SIZES
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import ABSENT
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertPlacement
from tests.reference.layer import expected_traffic
from tests.support.cover import full
from tests.support.routings import Case, D, random_case, round_trip
from tests.support.worlds import RankContext

EXCHANGES = ("counts", "pair rows", "dispatch", "combine")


def run_case(rank: int, case: Case, wire: AllToAll, seed: int, options: dict[str, Any]) -> Any:
    """Compares one rank's part of a case with the oracle, and its traffic with the closed form. Returns the plan."""
    context, chosen = DispatchContext(case.placement, wire), case.experts_TK[rank]
    dispatcher: Any = PipelinedDispatcher(context, **options) if options else AllToAllDispatcher(context)
    assignments = case.assignments(rank, torch.empty(chosen.size))
    trip = round_trip(dispatcher, assignments, case.placement, rank, len(chosen), comm_stats=wire.comm_stats, seed=seed)
    tokens, experts = case.taken(rank)
    rows, pairs = expected_traffic(tokens, experts, case.placement.rank_of_expert, rank)
    assert trip.plan.sent == SentCounts(rows, len(experts), pairs)
    received = sum(sum(each.rows.receive) for each in getattr(trip.plan, "chunks", [trip.plan]))
    assert trip.forward_bytes == (rows + received) * D * 8
    assert trip.total_bytes == 2 * trip.forward_bytes
    events = wire.comm_stats.events or []
    exchanges = [event for event in events if event.startswith(EXCHANGES)]
    assert sorted(event for event in events if event.startswith("wait")) == sorted(f"wait {name}" for name in exchanges)
    assert [event for event in events if event.startswith("sync")] == [f"sync {SPLIT_SIZES}"]
    return trip.plan


def run_cases(rank: RankContext, seeds: range, options: dict[str, Any]) -> int:
    """Runs random cases. Without options the plain dispatcher plans and dispatches in two calls. With options the pipelined
    dispatcher does both in one call."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    wire = AllToAll(mesh.ep if rank.world_size > 1 else None, CommStats(events=[]))
    for seed in seeds:
        run_case(rank.rank, random_case(seed, rank.world_size), wire, seed, options)
    return len(seeds)


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [full(1, range(300)), (2, range(60)), (4, range(45)), full(2, range(60, 400)), full(4, range(45, 300))],
    ids=str,
)
def test_ledger_equals_the_closed_form_on_random_routings(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range
) -> None:
    """The 1,000 routings include ranks without tokens or experts, batches of only null choices, and an expert that
    takes all tokens."""
    cases = [random_case(seed, world_size) for seed in seeds]
    assert any(all((c == ABSENT).all() for c in case.experts_TK) for case in cases)
    assert any(case.experts_TK[0].shape[0] == 0 for case in cases)
    if world_size > 1:
        assert any(() in case.slots for case in cases)
    assert run_in_world(world_size, run_cases, seeds, {}) == [len(seeds)] * world_size


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (4, {"overlap": True, "chunks": 3}),
        full(4, {"overlap": True}),
        full(4, {"chunks": 2}),
        *(full(size, options) for size in (1, 2) for options in ({"overlap": True}, {"chunks": 2})),
    ],
    ids=str,
)
def test_so_it_does_with_overlap_and_chunks(
    run_in_world: Callable[..., list[Any]], world_size: int, options: dict[str, Any]
) -> None:
    """With overlap and chunks the ledger is right, too. test_overlap.py tests the order of the exchanges."""
    assert run_in_world(world_size, run_cases, range(20), options) == [20] * world_size


#   rank 0 holds experts 0 1 3, rank 1 holds expert 2, rank 2 holds none; x marks a null choice
#
#   rank 0   token 0 -> 0 2      own row 0, remote row to rank 1
#            token 1 -> 2 x      remote row to rank 1
#            token 2 -> x x      nothing
#   rank 1   token 0 -> 3 1      ONE row to rank 0 for both
#            token 1 -> 1 2      row to rank 0, own row 1
#   rank 2   no token
#
#   rank 0 computes, own rows first:  rows [t0 | r1.t0 r1.t1]      slots 0 1 3:  [t0] [r1.t0 r1.t1] [r1.t0]
#   rank 1 computes:                  rows [t1 | r0.t0 r0.t1]      slot  2:      [t1 r0.t0 r0.t1]
HAND = Case(
    slots=((0, 1, 3), (2,), ()),
    experts_TK=(
        np.array([[0, 2], [2, ABSENT], [ABSENT, ABSENT]]),
        np.array([[3, 1], [1, 2]]),
        np.zeros((0, 2), np.int64),
    ),
)


def plan_of_hand_case(rank: RankContext) -> tuple[Any, ...]:
    mesh = make_mesh(ep=3, device=torch.device("cpu"), timeout=600.0)
    plan = run_case(rank.rank, HAND, AllToAll(mesh.ep, CommStats(events=[])), 0, {})
    exchanged = (plan.rows.send, plan.rows.receive, plan.pairs.send, plan.pairs.receive)
    return (*exchanged, plan.row_S.tolist(), plan.row_O.tolist(), plan.row_of_pair_Q.tolist(), plan.slot_counts)


def test_the_case_drawn_by_hand(run_in_world: Callable[..., list[Any]]) -> None:
    """The result lists for each rank: rows sent, rows received, pairs sent, pairs received, tokens of sent rows, tokens of
    own rows, rows by slot, and slot sizes."""
    assert run_in_world(3, plan_of_hand_case) == [
        ((0, 2, 0), (0, 2, 0), (0, 2, 0), (0, 3, 0), [0, 1], [0], [0, 1, 2, 1], (1, 2, 1)),
        ((2, 0, 0), (2, 0, 0), (3, 0, 0), (2, 0, 0), [0, 1], [1], [0, 1, 2], (3,)),
        ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), [], [], [], ()),
    ]


def dispatchers(placement: ExpertPlacement, comm_stats: CommStats, **bound: int) -> dict[str, Any]:
    """Returns dispatchers over four ranks. Two ranks form a node for the dispatchers that send rows in two hops."""
    mesh = make_mesh(ep=4, device=torch.device("cpu"), timeout=600.0, ranks_per_node=2)
    hops = AllToAll(mesh.inter_node, comm_stats), AllToAll(mesh.intra_node, comm_stats)
    context = DispatchContext(placement, AllToAll(mesh.ep, comm_stats), hops=hops, **bound)  # pyright: ignore
    return {
        "all_to_all": AllToAllDispatcher(context),
        "pipelined": PipelinedDispatcher(context, chunks=2),
        "known_counts": KnownCountsDispatcher(context),
        "hierarchical": HierarchicalDispatcher(context, ranks_per_node=2),
        "by default": all_to_all(context, overlap=False, chunks=1),
    }


def overflow(rank: RankContext, kind: str, target: int) -> tuple[str, list[str]]:
    """Rank 0 sends five rows to a rank that may receive only four."""
    num_tokens = (5, 2, 0, 0)
    case = Case(((0,), (1,), (2,), (3,)), tuple(np.full((tokens, 1), target) for tokens in num_tokens))
    comm_stats = CommStats(events=[])
    # The other ranks have no bound. If they did not see the error, they would hang in the next exchange.
    bound = 4 if rank.rank == target else -1
    counts = tuple(tuple(tokens * (expert == target) for expert in range(4)) for tokens in num_tokens)
    assignments = case.assignments(rank.rank, torch.ones(num_tokens[rank.rank]))._replace(counts_WE=counts)
    try:
        dispatcher = dispatchers(case.placement, comm_stats, max_receive_rows=bound)[kind]
        dispatcher.plan(assignments, num_tokens[rank.rank])
    except ResourceError as error:
        return str(error), comm_stats.events or []
    return "no error", comm_stats.events or []


@pytest.mark.parametrize(
    ("kind", "target", "place"),
    [
        ("all_to_all", 1, "one layer"),
        ("pipelined", 1, "one layer"),
        ("known_counts", 1, "each layer"),
        ("hierarchical", 2, "one layer's inter-node hop"),
        ("hierarchical", 1, "one layer's intra-node hop"),
    ],
)
def test_more_rows_than_the_bound_are_an_error_before_any_row_is_exchanged(
    run_in_world: Callable[..., list[Any]], kind: str, target: int, place: str
) -> None:
    message, events = run_in_world(4, overflow, kind, target)[target]
    words = f"EP position {target} would receive 5 rows in {place}, more than parallel.max_receive_rows=4"
    assert message.startswith(words)
    assert not [event for event in events if DISPATCH_ROWS in event]
