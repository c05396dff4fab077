"""Two all-to-alls in flight on real ranks may be waited for in any order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.parallel.mesh import make_mesh
from tests.support.worlds import RankContext


def two_in_flight(rank: RankContext) -> dict[str, Any]:
    """Rank r sends r + 1 rows to its peer, twice. The second exchange receives into a slice of a larger buffer."""
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    comm_stats = CommStats(events=[])
    wire = AllToAll(mesh.ep, comm_stats, mesh.tracker)
    sizes = [[0, 1], [2, 0]]
    splits = Splits(tuple(sizes[rank.rank]), tuple(sizes[peer][rank.rank] for peer in range(2)))
    items = torch.full((sum(splits.send), 3), float(rank.rank + 1))
    buffer = torch.zeros(1 + sum(splits.receive), 3)
    first = wire.start(items, splits, name="first", layer="layers.7", payload=True)
    second = wire.start(items * 10, splits, name="second", out=buffer[1:])
    flying = [(pending.layer, pending.name, pending.splits == splits) for pending in (first, second)]
    unwatched = mesh.tracker.oldest()
    got_second, got_first = second.wait(), first.wait()
    with pytest.raises(AssertionError, match="has been waited for"):
        first.wait()
    return {
        "flying": flying,
        "watched": (unwatched, mesh.tracker.oldest(), mesh.tracker.entered),
        "first": got_first.tolist(),
        "second": got_second.tolist(),
        "buffer": buffer.tolist(),
        "events": comm_stats.events,
        "bytes": (comm_stats.payload_bytes, comm_stats.metadata_bytes),
    }


def test_two_exchanges_in_flight(run_in_world: Callable[..., list[Any]]) -> None:
    for rank, seen in enumerate(run_in_world(2, two_in_flight)):
        rows, value = (2, 2.0) if rank == 0 else (1, 1.0)
        assert seen["flying"] == [("layers.7", "first", True), ("", "second", True)]
        assert seen["watched"] == (None, None, 4)  # both calls and both waits were tracked, and none is still open
        assert seen["first"] == [[value] * 3] * rows
        assert seen["second"] == [[value * 10] * 3] * rows
        assert seen["buffer"] == [[0.0] * 3] + [[value * 10] * 3] * rows
        assert seen["events"] == ["first", "second", "wait second", "wait first"]
        assert seen["bytes"] == ((rank + 1) * 12, (rank + 1) * 12)
