"""Tests the formats, values, gradients, bytes and recompute of the adaptors to DeepEP and HybridEP. Stand-ins that keep
the libraries' contracts replace the libraries."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.deep_ep_v2 import DeepEPDispatcher, DeepEPPlan
from moe_dist.moe.dispatch.hybrid_ep import HybridEPDispatcher
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import expected_traffic
from tests.support.cover import full
from tests.support.deep_ep_gloo import deep_ep
from tests.support.hybrid_ep_gloo import hybrid_ep
from tests.support.one_rank_layer import one_rank_layer
from tests.support.routings import Case, D, random_case, round_trip
from tests.support.worlds import RankContext

LIBRARIES = ("DeepEP", "HybridEP")
MOST_TOKENS = 12


def equal_shapes(case: Case, *, tokens: bool) -> Case:
    """Pads a case so that all ranks have the same number of choices, as DeepEP needs. With `tokens` also pads all ranks
    to the same number of tokens, as HybridEP needs. The padding chooses no expert."""
    width = max(each.shape[1] for each in case.experts_TK)
    height = max(len(each) for each in case.experts_TK) if tokens else 0
    sizes = [(max(0, height - len(c)), width - c.shape[1]) for c in case.experts_TK]
    padded = [
        np.pad(chosen, ((0, more), (0, wider)), constant_values=ABSENT)
        for chosen, (more, wider) in zip(case.experts_TK, sizes, strict=True)
    ]
    return Case(case.slots, tuple(padded))


def make_dispatcher(
    library: str, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, top_k: int, tokens: int
) -> DeepEPDispatcher | HybridEPDispatcher:
    """Returns a dispatcher whose buffer fits `tokens` tokens."""
    if library == "HybridEP":
        return HybridEPDispatcher(DispatchContext(placement, wire, hidden_dim=hidden_dim))
    dispatcher = DeepEPDispatcher(DispatchContext(placement, wire, hidden_dim=hidden_dim), top_k=top_k)
    token_N = torch.arange(tokens).repeat_interleave(top_k)
    dispatcher.plan(Assignments(token_N, torch.full_like(token_N, ABSENT), torch.zeros(len(token_N))), tokens)
    return dispatcher


def stand_in(library: str, *, strict: bool, domain: int = 0) -> AbstractContextManager[None]:
    return deep_ep(strict=strict) if library == "DeepEP" else hybrid_ep(strict=strict, ranks_per_domain=domain)


def run_cases(rank: RankContext, library: str, domain: int, seeds: range) -> int:
    """Runs random cases, including ranks with different numbers of expert slots."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    comm_stats = CommStats(events=[])
    wire = AllToAll(mesh.ep, comm_stats)
    map_event = ["HybridEP routing map"] if library == "HybridEP" else []
    with stand_in(library, strict=False, domain=domain):
        for seed in seeds:
            case = equal_shapes(random_case(seed, rank.world_size), tokens=library == "HybridEP")
            chosen = case.experts_TK[rank.rank]
            assignments = case.assignments(rank.rank, torch.empty(chosen.size))
            dispatcher = make_dispatcher(
                library, case.placement, wire, hidden_dim=D, top_k=chosen.shape[1], tokens=MOST_TOKENS
            )
            trip = round_trip(
                dispatcher, assignments, case.placement, rank.rank, len(chosen), comm_stats=comm_stats, seed=seed,
                dtype=torch.float32, tolerance=2e-5,
            )  # fmt: skip
            tokens, experts = case.taken(rank.rank)
            rows, pairs = expected_traffic(tokens, experts, case.placement.rank_of_expert, rank.rank)
            plan = trip.plan
            assert plan.sent == SentCounts(rows_remote=rows, pairs=len(experts), pairs_remote=pairs)
            own = {(token, rank.rank) for token, expert in zip(tokens, experts, strict=True)
                   if case.placement.rank_of_expert[expert] == rank.rank}  # fmt: skip
            assert plan.own_rows == len(own)
            arrived = sum(
                len({token for token, expert in zip(*case.taken(other), strict=True)
                     if case.placement.rank_of_expert[expert] == rank.rank})
                for other in range(rank.world_size) if other != rank.rank
            )  # fmt: skip
            assert trip.forward_bytes == (rows + arrived) * D * 4
            assert trip.total_bytes == 2 * trip.forward_bytes
            assert comm_stats.events == [
                f"sync {library} counts", f"{library} dispatch", f"{library} dispatch weights", *map_event,
                f"{library} combine",
                f"{library} combine backward",
                f"{library} dispatch backward", f"{library} dispatch backward weights",
            ]  # fmt: skip
    return len(seeds)


@pytest.mark.parametrize(
    ("library", "world_size", "domain", "seeds"),
    [
        ("DeepEP", 2, 0, range(40)),
        full("DeepEP", 4, 0, range(40)),
        ("HybridEP", 2, 2, range(40)),
        full("HybridEP", 4, 4, range(40)),
        full("HybridEP", 4, 2, range(40)),
    ],
    ids=str,
)
def test_equals_the_oracle_on_random_routings(
    run_in_world: Callable[..., list[Any]], library: str, world_size: int, domain: int, seeds: range
) -> None:
    """Runs HybridEP with one and with two NVLink domains."""
    cases = [random_case(seed, world_size) for seed in seeds]
    assert any(len({len(slots) for slots in case.slots}) > 1 for case in cases), "ranks with different numbers of slots"
    assert any(() in case.slots for case in cases)
    assert run_in_world(world_size, run_cases, library, domain, seeds) == [len(seeds)] * world_size


# rank 0 holds experts 0 1 3, rank 1 holds expert 2. DeepEP numbers 3 slots per rank: experts 0 1 3 become 0 1 2, expert
# 2 becomes 3. HybridEP numbers 4 slots per rank: experts 0 1 3 become 0 1 2, expert 2 becomes 4.
HAND = Case(((0, 1, 3), (2,)), (np.array([[3, 2], [-1, 1], [-1, -1], [-1, -1]]), np.array([[2, -1], [-1, 2], [-1, -1], [-1, -1]])))  # fmt: skip # noqa: E501


def hand(rank: RankContext, library: str) -> dict[str, Any]:
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    with stand_in(library, strict=True):
        wire = AllToAll(mesh.ep, CommStats())
        dispatcher: Any = make_dispatcher(library, HAND.placement, wire, hidden_dim=256, top_k=2, tokens=4)
        chosen = HAND.experts_TK[rank.rank]
        weight_N = torch.arange(1.0, chosen.size + 1)
        plan = dispatcher.plan(HAND.assignments(rank.rank, weight_N), len(chosen))
        with pytest.raises(AssertionError, match="call dispatch first"):
            _ = plan.row_of_pair_Q
        h_TD = (torch.arange(float(len(chosen)))[:, None] + 10 * rank.rank).expand(-1, 256).bfloat16()
        got = dispatcher.dispatch(h_TD, weight_N, plan)
        again = dispatcher.dispatch(h_TD, weight_N, plan)  # recompute dispatches again, with the same handle
        torch.testing.assert_close(again.rows_RD, got.rows_RD, rtol=0, atol=0)
        torch.testing.assert_close(again.weight_Q, got.weight_Q, rtol=0, atol=0)
        assert got.sorted_pairs
        y_TD = dispatcher.combine(got.rows_RD * got.weight_Q[:, None].bfloat16(), plan)
    sent = plan.topk_idx_TK if isinstance(plan, DeepEPPlan) else plan.routing_map_TX
    return {
        "sent": sent.tolist() if library == "DeepEP" else sent.nonzero().tolist(),
        "pairs": sorted(zip(got.rows_RD[:, 0].tolist(), got.weight_Q.tolist(), strict=True)),
        "slots": plan.slot_counts,
        "y": y_TD[:, 0].tolist(),
    }


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_case_drawn_by_hand(run_in_world: Callable[..., list[Any]], library: str) -> None:
    sent = {
        "DeepEP": ([[2, 3], [-1, 1], [-1, -1], [-1, -1]], [[3, -1], [-1, 3], [-1, -1], [-1, -1]]),
        "HybridEP": ([[0, 2], [0, 4], [1, 1]], [[0, 4], [1, 4]]),
    }[library]
    assert run_in_world(2, hand, library) == [
        {"sent": sent[0], "pairs": [(0.0, 1.0), (1.0, 4.0)], "slots": (0, 1, 1), "y": [0.0, 4.0, 0.0, 0.0]},
        {
            "sent": sent[1],
            "pairs": [(0.0, 2.0), (10.0, 1.0), (11.0, 4.0)],
            "slots": (3,),
            "y": [10.0, 44.0, 0.0, 0.0],
        },
    ]


def larger_buffer(rank: RankContext) -> list[Any]:
    """Calls DeepEP with 32-bit ids in deterministic mode, for 4, 8 and then 2 tokens."""
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    placement = ExpertPlacement((ExpertGroup("all", 2, 0, 1, 4, 0, ("text",)),), ((0,), (1,)))
    dispatcher = DeepEPDispatcher(
        DispatchContext(placement, AllToAll(mesh.ep, CommStats()), hidden_dim=256, deterministic=True), top_k=1
    )
    found = []
    with deep_ep(id_dtype=torch.int32):
        for tokens in (4, 8, 2):
            token_N = torch.arange(tokens)
            plan = dispatcher.plan(Assignments(token_N, torch.ones_like(token_N), torch.ones(tokens)), tokens)
            rows = dispatcher.dispatch(token_N[:, None].expand(-1, 256).bfloat16(), torch.ones(tokens), plan).rows_RD
            found.append((dispatcher.buffer.num_max_tokens_per_rank, dispatcher.buffer.deterministic, rows[:, 0].tolist()))
    return found


def test_deep_eps_buffer_grows_and_sorts(run_in_world: Callable[..., list[Any]]) -> None:
    first, second = run_in_world(2, larger_buffer)
    assert first == [(4, True, []), (8, True, []), (8, True, [])]
    assert second == [(size, True, [*range(tokens)] * 2) for size, tokens in ((4, 4), (8, 8), (8, 2))]


GROUPS = (ExpertGroup("text", 4, 2, 2, 6, 0, ("text",)), ExpertGroup("image", 3, 1, 2, 6, 4, ("image",)))
PLACEMENT = ExpertPlacement(GROUPS, ((0, 1, 2, 4, 5), (3, 6)))


def layers(rank: RankContext, library: str, recompute: str, pair_budget: int | None) -> list[float]:
    """Returns the largest differences in y and in all gradients between a layer that uses the library and a layer that uses
    `all_to_all`."""
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    found = []
    with stand_in(library, strict=False):
        for make in (
            lambda placement, wire: AllToAllDispatcher(DispatchContext(placement, wire)),
            lambda placement, wire: make_dispatcher(library, placement, wire, hidden_dim=16, top_k=2, tokens=12),
        ):
            torch.manual_seed(rank.rank)
            options = {"placement": PLACEMENT, "rank": rank.rank, "recompute": recompute, "pair_budget": pair_budget}
            dispatcher = make(PLACEMENT, AllToAll(mesh.ep, CommStats()))
            layer = one_rank_layer(TopKRouter(RouterContext(16, GROUPS)), 16, dispatcher=dispatcher, **options)
            x_TD, group_T = torch.randn(12, 16, requires_grad=True), torch.randint(-1, 2, (12,))
            y_TD, report = layer(x_TD, group_T)
            y_TD.backward(torch.randn(y_TD.shape))
            grads = [parameter.grad for parameter in layer.parameters()]
            counts = torch.tensor(report.sent[:3])
            found.append([y_TD.detach(), x_TD.grad, counts, *grads])
    scale = [max(1.0, float(theirs.abs().max())) for theirs in found[0] if theirs.numel()]
    pairs = [(ours, theirs) for theirs, ours in zip(*found, strict=True) if theirs.numel()]
    return [float((ours - theirs).abs().max()) / s for (ours, theirs), s in zip(pairs, scale, strict=True)]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("recompute", "pair_budget"), [("none", None), ("experts", None), ("block", None), ("none", 3)])
def test_the_layer_equals_that_of_all_to_all(
    run_in_world: Callable[..., list[Any]], library: str, recompute: str, pair_budget: int | None
) -> None:
    for differences in run_in_world(2, layers, library, recompute, pair_budget):
        assert max(differences) < 1e-5
