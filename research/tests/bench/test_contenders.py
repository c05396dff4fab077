"""The benchmark's contender `floor` moves exactly the rows that `ours` sends, even if there are more rows than tokens."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.parallel.mesh import make_mesh
from research.bench.contenders import at_rank, expected, floor, make_case, naive, ours
from research.bench.measure import count_sent
from research.bench.points import Point
from tests.support.worlds import RankContext

POINT = Point(tokens=64, hidden=8, experts=16, top_k=4, null=0.0)


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        if name == "copy_":
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def measure_floor(rank: RankContext) -> dict[str, Any]:
    """Compares the floors' sent and copied rows with the dispatcher's, and `ours` and `naive` with expected sums."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    case = make_case(POINT, mesh, seed=0)
    plan = case.dispatcher.plan(case.taken, case.h_TD.shape[0])
    runs = {
        "floor": floor(case, own_rows=False),
        "floor, all": floor(case, own_rows=True),
        "dispatch, combine": at_rank(case, planned=True),
        "ours at rank": at_rank(case, planned=False),
        "ours": ours(case, case.taken),
        "naive": naive(case, nulls=True),
    }
    sent = {name: count_sent(run, mesh, hidden=POINT.hidden) for name, run in runs.items()}
    for name in ("ours", "naive"):
        result = runs[name]()
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, expected(case, case.taken))
    copies = {}
    for name in ("floor", "floor, all"):
        with Copies() as seen:
            runs[name]()
        copies[name] = (dict(seen.operations), seen.rows)
    return {"sent": sent, "copies": copies, "rows": (sum(plan.rows.send), sum(plan.rows.receive), plan.row_O.shape[0])}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_floor_is_two_exchanges_and_one_copy_each_way(run_in_world: Any, world_size: int) -> None:
    results = run_in_world(world_size, measure_floor)
    for result in results:
        send, receive, own = result["rows"]
        assert (send > POINT.tokens) == (world_size == 4), "at 4 ranks a token goes to several"
        operations, rows = result["copies"]["floor"]
        assert rows == [send, 0, receive, 0]
        assert set(operations) <= {"copy_", "alltoall_base_"}
        assert result["copies"]["floor, all"][1] == [send, own, receive, own]
        sent = result["sent"]
        assert (sent["floor"].calls, sent["dispatch, combine"].calls, sent["ours at rank"].calls) == (2, 3, 5)
        assert sent["floor"].payload_bytes == sent["ours at rank"].payload_bytes == sent["ours"].payload_bytes
        assert sent["floor"].other_bytes == 0
    assert results[0]["sent"]["floor"].rows == 2 * sum(result["rows"][0] for result in results)
