"""The known-counts dispatcher sends one row per pair without a host sync."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher
from moe_dist.moe.routing.types import Assignments
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.distributed.test_dispatch import dispatchers
from tests.support.routings import D, random_case, round_trip
from tests.support.syncs import host_syncs
from tests.support.worlds import RankContext

FORWARD = ["dispatch weights", "dispatch rows", "combine rows"]
BACKWARD = ["combine rows backward", "dispatch weights backward", "dispatch rows backward"]


def expert_choice(seed: int, tokens_W: list[int], share_E: list[int], rank: int) -> Assignments:
    """Each expert takes as many random tokens of each rank as its capacity, or all tokens of a rank that has fewer."""
    counts = tuple(tuple(min(capacity, tokens) for capacity in share_E) for tokens in tokens_W)
    rng = np.random.default_rng([seed, rank])
    chosen = [np.sort(rng.permutation(tokens_W[rank])[:count]) for count in counts[rank]]
    token_N = torch.from_numpy(np.concatenate([*chosen, np.zeros(0, np.int64)]).astype(np.int64))
    expert_N = torch.arange(len(share_E)).repeat_interleave(torch.tensor(counts[rank]))
    return Assignments(token_N, expert_N, torch.ones(len(token_N)), counts)


def run_cases(rank: RankContext, seeds: range) -> int:
    """Compares the results of random capacities and placements with the oracle, and the bytes with the known counts."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    comm_stats = CommStats(events=[])
    wire = AllToAll(mesh.ep, comm_stats)
    for seed in seeds:
        rng = np.random.default_rng([seed, rank.world_size])
        placement = random_case(seed, rank.world_size).placement
        share_E = rng.integers(0, 5, placement.num_experts).tolist()
        tokens_W = rng.integers(0, 9, rank.world_size).tolist()
        assignments = expert_choice(seed, tokens_W, share_E, rank.rank)
        dispatcher = KnownCountsDispatcher(DispatchContext(placement, wire))
        trip = round_trip(
            dispatcher, assignments, placement, rank.rank, tokens_W[rank.rank], comm_stats=comm_stats, seed=seed
        )
        counts = assignments.counts_WE
        mine, ranks = set(placement.slots[rank.rank]), range(rank.world_size)
        sent = sum(count for expert, count in enumerate(counts[rank.rank]) if expert not in mine)
        received = sum(counts[source][expert] for source in ranks if source != rank.rank for expert in mine)
        assert (trip.plan.sent.rows_remote, trip.plan.sent.pairs_remote) == (sent, sent)
        assert trip.forward_bytes == (sent + received) * D * 8
        assert trip.total_bytes == 2 * trip.forward_bytes
        events = [event for event in comm_stats.events or [] if not event.startswith("wait ")]
        assert events == ([] if mesh.ep is None else FORWARD + BACKWARD)
    return len(seeds)


@pytest.mark.parametrize(("world_size", "seeds"), [(1, range(20)), (2, range(60)), (4, range(50))], ids=str)
def test_equals_the_oracle_and_its_closed_form(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range
) -> None:
    """The cases include experts without capacity, ranks without tokens or experts, and ranks with different numbers of
    tokens."""
    assert run_in_world(world_size, run_cases, seeds) == [len(seeds)] * world_size


GROUPS = (ExpertGroup("text", 4, 0, 1, 4, 0, ("text",)), ExpertGroup("image", 4, 0, 1, 4, 4, ("image",)))
ONE_OF_A_GROUP = ExpertPlacement(GROUPS, ((0, 4), (1, 5), (2, 6), (3, 7)))
TWO_OF_A_GROUP = ExpertPlacement(GROUPS, ((0, 1), (2, 3), (4, 5), (6, 7)))


def count_syncs(rank: RankContext, kind: str, placement: ExpertPlacement) -> dict[str, Any]:
    """Counts the host's reads of tensors in a forward and backward, after a first pass that fills the cached tables."""
    comm_stats = CommStats(events=[])
    dispatcher = dispatchers(placement, comm_stats)[kind]
    seen: list[list[str]] = []
    for seed in (0, 1):
        assignments = expert_choice(seed, [6, 6, 0, 5], [2] * 8, rank.rank)
        num_tokens = [6, 6, 0, 5][rank.rank]
        h_TD = torch.ones(num_tokens, D, requires_grad=True)
        weight_N = assignments.weight_N.clone().requires_grad_()
        with host_syncs() as syncs:
            plan = dispatcher.plan(assignments, num_tokens)
            got = dispatcher.dispatch(h_TD, weight_N, plan)
            dispatcher.combine(got.rows_RD * got.weight_Q.sum(), plan).sum().backward()
        seen.append(list(syncs))
    named = [event for event in comm_stats.events or [] if event.startswith("sync ")]
    return {"syncs": seen[1], "named": len(named)}


@pytest.mark.parametrize(("kind", "placement", "syncs"), [
    ("known_counts", TWO_OF_A_GROUP, 0),
    ("by default", ONE_OF_A_GROUP, 0),
    ("by default", TWO_OF_A_GROUP, 1),
], ids=lambda each: each if isinstance(each, str) else "")  # fmt: skip
def test_host_syncs_of_a_layer(
    run_in_world: Callable[..., list[Any]], kind: str, placement: ExpertPlacement, syncs: int
) -> None:
    for seen in run_in_world(4, count_syncs, kind, placement):
        # On a CPU numpy sorts in the tensor's own memory, which neither copies nor waits.
        reads = [read for read in seen["syncs"] if read != "numpy" or not syncs]
        assert reads == ["tolist"] * syncs
        assert seen["named"] == 2 * syncs, "each sync has a name in the record of events"


def test_wrong_numbers_of_pairs_are_refused() -> None:
    placement = ExpertPlacement(GROUPS, (tuple(range(8)),))
    dispatcher = KnownCountsDispatcher(DispatchContext(placement, AllToAll(None, CommStats())))
    assignments = Assignments(torch.arange(2), torch.tensor([0, 4]), torch.ones(2), ((2, 0, 0, 0, 1, 0, 0, 0),))
    with pytest.raises(AssertionError, match="counts_WE"):
        dispatcher.plan(assignments, 2)


def test_a_broken_promise_is_seen_before_anything_is_sent() -> None:
    placement = ExpertPlacement(GROUPS, (tuple(range(8)),))
    dispatcher = KnownCountsDispatcher(DispatchContext(placement, AllToAll(None, CommStats())))
    counts = ((1, 1, 0, 0, 0, 0, 0, 0),)
    for expert_N in ([0, 4], [1, 0], [0, -1]):
        assignments = Assignments(torch.arange(2), torch.tensor(expert_N), torch.ones(2), counts)
        with pytest.raises(RuntimeError, match="counts_WE: pairs are not as promised"):
            dispatcher.plan(assignments, 2)
