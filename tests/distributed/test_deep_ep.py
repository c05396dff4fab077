"""The adaptor to DeepEP over a stand-in with DeepEP's meaning: its index format, values, gradients, bytes and recompute."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.deep_ep import LAYOUT, DeepEPDispatcher
from moe_dist.parallel.mesh import make_mesh
from tests.reference.layer import expected_traffic
from tests.support.deep_ep_gloo import GlooBuffer
from tests.support.routings import Case, D, random_case, round_trip
from tests.support.worlds import RankContext


def run_cases(rank: RankContext, seeds: range) -> int:
    """Body of a standing world: random cases, ranks with different numbers of slots among them."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    assert mesh.ep is not None
    comm_stats = CommStats(events=[])
    wire, buffer = AllToAll(mesh.ep, comm_stats), GlooBuffer(mesh.ep, any_dtype=True)
    for seed in seeds:
        case = random_case(seed, rank.world_size)
        chosen = case.experts_TK[rank.rank]
        # Every rank has the same number of columns: DeepEP's K is one number.
        width = max(each.shape[1] for each in case.experts_TK)
        wide = np.pad(chosen, ((0, 0), (0, width - chosen.shape[1])), constant_values=-1)
        case = Case(case.slots, tuple(wide if i == rank.rank else c for i, c in enumerate(case.experts_TK)))
        assignments = case.assignments(rank.rank, torch.empty(wide.size))
        dispatcher = DeepEPDispatcher(case.placement, wire, hidden_dim=D, top_k=width, buffer=buffer)
        trip = round_trip(
            dispatcher, assignments, case.placement, rank.rank, len(wide), comm_stats=comm_stats, seed=seed,
            dtype=torch.float32, tolerance=2e-5,
        )  # fmt: skip
        tokens, experts = case.taken(rank.rank)
        rows, pairs = expected_traffic(tokens, experts, case.placement.rank_of_expert, rank.rank)
        plan = trip.plan
        assert tuple(plan.sent) == (rows, len(experts), pairs)
        received = sum(plan.arrival.handle.received) - plan.own_rows
        assert trip.forward_bytes == (rows + received) * D * 4
        assert trip.total_bytes == 2 * trip.forward_bytes
        assert comm_stats.events == [
            f"sync {LAYOUT}", "DeepEP dispatch", "DeepEP dispatch weights", "DeepEP combine",
            "DeepEP combine backward",
            "DeepEP dispatch backward", "DeepEP dispatch backward weights",
        ]  # fmt: skip
    return len(seeds)


@pytest.mark.parametrize(("world_size", "seeds"), [(2, range(40)), (4, range(40))], ids=str)
def test_equals_the_oracle_on_random_routings(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range
) -> None:
    cases = [random_case(seed, world_size) for seed in seeds]
    assert any(len({len(slots) for slots in case.slots}) > 1 for case in cases), "ranks with different numbers of slots"
    assert any(() in case.slots for case in cases)
    assert run_in_world(world_size, run_cases, seeds) == [len(seeds)] * world_size


#   rank 0 holds experts 0 1 3, rank 1 holds expert 2: three ids a rank, of which 4 and 5 are phantoms
#   expert 0 -> 0, 1 -> 1, 3 -> 2, 2 -> 3
HAND = Case(((0, 1, 3), (2,)), (np.array([[3, 2], [-1, 1], [-1, -1]]), np.array([[2, -1]])))


def hand(rank: RankContext) -> dict[str, Any]:
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    assert mesh.ep is not None
    wire = AllToAll(mesh.ep, CommStats())
    dispatcher = DeepEPDispatcher(HAND.placement, wire, hidden_dim=8, top_k=2, buffer=GlooBuffer(mesh.ep))
    chosen = HAND.experts_TK[rank.rank]
    weight_N = torch.arange(1.0, chosen.size + 1)
    plan = dispatcher.plan(HAND.assignments(rank.rank, weight_N), len(chosen))
    with pytest.raises(AssertionError, match="call dispatch first"):
        _ = plan.row_of_pair_Q
    h_TD = (torch.arange(float(len(chosen)))[:, None] + 10 * rank.rank).expand(-1, 8).bfloat16()
    got = dispatcher.dispatch(h_TD, weight_N, plan)
    again = dispatcher.dispatch(h_TD, weight_N, plan)  # as recompute does: by the handle
    torch.testing.assert_close(again.rows_RD, got.rows_RD, rtol=0, atol=0)
    torch.testing.assert_close(again.weight_Q, got.weight_Q, rtol=0, atol=0)
    return {
        "experts": dispatcher.num_slots,
        "topk_idx": plan.topk_idx_TK.tolist(),
        "rows": got.rows_RD[:, 0].tolist(),
        "weights": got.weight_Q.tolist(),
        "row_of_pair": plan.row_of_pair_Q.tolist(),
        "slots": plan.slot_counts,
    }


def test_the_case_drawn_by_hand(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, hand) == [
        {
            "experts": 6,
            "topk_idx": [[2, 3], [-1, 1], [-1, -1]],
            "rows": [0.0, 1.0],
            "weights": [4.0, 1.0],
            "row_of_pair": [1, 0],
            "slots": (0, 1, 1),
        },
        {
            "experts": 6,
            "topk_idx": [[3, -1]],
            "rows": [0.0, 10.0],
            "weights": [2.0, 1.0],
            "row_of_pair": [0, 1],
            "slots": (2,),
        },
    ]
