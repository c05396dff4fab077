"""The rows counted for another placement equal the rows that a run with this placement sends. The rows counted for the
run's own placement equal the ledger's rows."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.rank_balance.placement_rows import PlacementRows
from tests.support.cover import full
from tests.support.layouts import SEQUENCES, Layout, TrainingRank, batch_of, placement_of
from tests.support.worlds import RankContext

POLICIES = ("pinned", "interleaved", "uneven")


def one_step(rank: RankContext, layout: Layout) -> tuple[int, dict[str, int]]:
    """Returns the ledger's rows, and the rows counted for each placement."""
    training = TrainingRank(layout)
    mesh = training.mesh
    placements = {policy: placement_of(policy, layout.ep, layout.groups) for policy in POLICIES}
    counter = PlacementRows(placements, ep_rank=mesh.ep_rank, first=3, device=mesh.device)
    assert [counter.due(number) for number in (2, 3)] == [False, True]
    each = SEQUENCES // rank.world_size
    batches = [batch_of(0, micro, rank.rank * each, each) for micro in range(2)]
    aux = AuxSettings("null_averaged", balance=0.0 if layout.choice else 0.02, z=0.0 if layout.choice else 1e-3)
    result = training.step(batches, lr=1e-2, aux=aux, number=3, watchers=[counter])
    return result.ledger["rows_remote"], counter.total(mesh.world, mesh.tracker)


@pytest.mark.parametrize("choice", [None, full("rank")])
def test_counted_rows_are_sent_rows(run_in_world: Callable[..., list[Any]], choice: str | None) -> None:
    sent, counted = {}, []
    for policy in POLICIES:
        for rows, by_placement in run_in_world(2, one_step, Layout(2, 1, policy, recompute="block", choice=choice)):
            sent[policy] = rows
            counted.append(by_placement)
    assert len(set(sent.values())) > 1, "the placements send different numbers of rows"
    assert all(each == sent for each in counted)
