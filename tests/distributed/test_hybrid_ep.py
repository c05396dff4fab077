"""The adaptor to HybridEP over a stand-in with its meaning: its index format, values, gradients, bytes and recompute."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.hybrid_ep import COUNTS, HybridEPDispatcher
from moe_dist.moe.dispatch.kernels import SlotNumbers
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing import ABSENT
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import expected_traffic
from tests.support.hybrid_ep_gloo import GlooHybridBuffer
from tests.support.routings import Case, D, random_case, round_trip
from tests.support.worlds import RankContext


def equal_tokens(case: Case) -> Case:
    """The case with as many tokens on every rank: HybridEP gathers maps of one shape. Tokens are added without choices."""
    tokens = max(len(each) for each in case.experts_TK)
    padded = (np.pad(c, ((0, tokens - len(c)), (0, 0)), constant_values=ABSENT) for c in case.experts_TK)
    return Case(case.slots, tuple(padded))


def buffer_of(group: Any, placement: ExpertPlacement, *, any_dtype: bool = False, domain: int | None = None) -> Any:
    slots = SlotNumbers.of(placement, multiple=4).slots_per_rank
    ranks = domain or placement.num_ranks
    return GlooHybridBuffer(group, num_local_experts=slots, ranks_per_domain=ranks, any_dtype=any_dtype)


def run_cases(rank: RankContext, domain: int, seeds: range) -> int:
    """Body of a standing world: random cases, ranks with different numbers of slots among them."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    comm_stats = CommStats(events=[])
    wire = AllToAll(mesh.ep, comm_stats)
    for seed in seeds:
        case = equal_tokens(random_case(seed, rank.world_size))
        chosen = case.experts_TK[rank.rank]
        assignments = case.assignments(rank.rank, torch.empty(chosen.size))
        buffer = buffer_of(mesh.ep, case.placement, any_dtype=True, domain=domain)
        dispatcher = HybridEPDispatcher(case.placement, wire, hidden_dim=D, buffer=buffer)
        trip = round_trip(
            dispatcher, assignments, case.placement, rank.rank, len(chosen), comm_stats=comm_stats, seed=seed,
            dtype=torch.float32, tolerance=2e-5,
        )  # fmt: skip
        tokens, experts = case.taken(rank.rank)
        rows, pairs = expected_traffic(tokens, experts, case.placement.rank_of_expert, rank.rank)
        plan = trip.plan
        assert tuple(plan.sent) == (rows, len(experts), pairs)
        received = sum(plan.arrival.handle[1]) - plan.own_rows
        assert trip.forward_bytes == (rows + received) * D * 4
        assert trip.total_bytes == 2 * trip.forward_bytes
        assert comm_stats.events == [
            f"sync {COUNTS}", "HybridEP dispatch", "HybridEP dispatch weights", "HybridEP routing map", "HybridEP combine",
            "HybridEP combine backward",
            "HybridEP dispatch backward", "HybridEP dispatch backward weights",
        ]  # fmt: skip
    return len(seeds)


@pytest.mark.parametrize(
    ("world_size", "domain", "seeds"), [(2, 2, range(40)), (4, 4, range(40)), (4, 2, range(40))], ids=str
)
def test_equals_the_oracle_on_random_routings(
    run_in_world: Callable[..., list[Any]], world_size: int, domain: int, seeds: range
) -> None:
    """One NVLink domain, and two of them."""
    cases = [random_case(seed, world_size) for seed in seeds]
    assert any(len({len(slots) for slots in case.slots}) > 1 for case in cases), "ranks with different numbers of slots"
    assert any(() in case.slots for case in cases)
    assert run_in_world(world_size, run_cases, domain, seeds) == [len(seeds)] * world_size


#   rank 0 holds experts 0 1 3 as slots 0 1 2, rank 1 holds expert 2 as slot 4; 3 5 6 7 are phantoms
HAND = Case(((0, 1, 3), (2,)), (np.array([[3, 2], [-1, 1], [-1, -1]]), np.array([[2, -1], [-1, -1], [-1, -1]])))


def hand(rank: RankContext) -> dict[str, Any]:
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    buffer = buffer_of(mesh.ep, HAND.placement)
    dispatcher = HybridEPDispatcher(HAND.placement, AllToAll(mesh.ep, CommStats()), hidden_dim=8, buffer=buffer)
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
        "marks": plan.routing_map_TX.nonzero().tolist(),
        "rows": got.rows_RD[:, 0].tolist(),
        "weights": got.weight_Q.tolist(),
        "row_of_pair": plan.row_of_pair_Q.tolist(),
        "slots": plan.slot_counts,
    }


def test_the_case_drawn_by_hand(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, hand) == [
        {
            "marks": [[0, 2], [0, 4], [1, 1]],
            "rows": [0.0, 1.0],
            "weights": [4.0, 1.0],
            "row_of_pair": [1, 0],
            "slots": (0, 1, 1),
        },
        {"marks": [[0, 4]], "rows": [0.0, 10.0], "weights": [2.0, 1.0], "row_of_pair": [0, 1], "slots": (2,)},
    ]


GROUPS = (ExpertGroup("text", 4, 2, 2, 6, 0, ("text",)), ExpertGroup("image", 3, 1, 2, 6, 4, ("image",)))
PLACEMENT = ExpertPlacement(GROUPS, ((0, 1, 2, 4, 5), (3, 6)))


def layers(rank: RankContext, recompute: str) -> list[float]:
    """Largest differences of y and all gradients between the whole layer over HybridEP and over `all_to_all`."""
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    found = []
    for make in (
        lambda wire: AllToAllDispatcher(PLACEMENT, wire),
        lambda wire: HybridEPDispatcher(
            PLACEMENT, wire, hidden_dim=16, buffer=buffer_of(mesh.ep, PLACEMENT, any_dtype=True)
        ),
    ):
        torch.manual_seed(rank.rank)
        layer = MoELayer(
            norm=torch.nn.Identity(),
            router=TopKRouter(16, GROUPS),
            experts=Experts(16, GROUPS, [len(PLACEMENT.local_experts(rank.rank, group)) for group in GROUPS]),
            dispatcher=make(AllToAll(mesh.ep, CommStats())),
            recompute=recompute,  # pyright: ignore[reportArgumentType]
        )
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        x_TD, group_T = torch.randn(12, 16, requires_grad=True), torch.randint(-1, 2, (12,))
        y_TD, report = layer(x_TD, group_T)
        y_TD.backward(torch.randn(y_TD.shape))
        grads = [parameter.grad for parameter in layer.parameters()]
        counts = torch.tensor([report.rows_remote, report.pairs, report.pairs_remote])
        found.append([y_TD.detach(), x_TD.grad, counts, *grads])
    scale = [max(1.0, float(theirs.abs().max())) for theirs in found[0] if theirs.numel()]
    pairs = [(ours, theirs) for theirs, ours in zip(*found, strict=True) if theirs.numel()]
    return [float((ours - theirs).abs().max()) / s for (ours, theirs), s in zip(pairs, scale, strict=True)]


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_the_layer_equals_that_of_per_rank(run_in_world: Callable[..., list[Any]], recompute: str) -> None:
    for differences in run_in_world(2, layers, recompute):
        assert max(differences) < 1e-5
