"""The dispatch plan's counting sorts give the order of a stable sort."""

import sys
from types import SimpleNamespace

import pytest
import torch

from moe_dist.comm.all_to_all import Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.planning import DispatchPlanner
from moe_dist.moe.kernels.torch_kernels import counting_order
from moe_dist.moe.routing.types import Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


@pytest.mark.parametrize("num_keys", [1, 9, 256, 257, 30_000, 32_768, 32_769, 40_000, 1 << 31])
@pytest.mark.parametrize("count", [0, 1, 3_000])
def test_counting_order_is_a_stable_sort(num_keys: int, count: int) -> None:
    key_N = torch.randint(0, num_keys, (count,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counting_order(key_N, num_keys), torch.sort(key_N, stable=True).indices)


class SilentWire:
    """An exchange in which no other rank sends anything."""

    group = object()

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.comm_stats = 0, size, CommStats()

    def exchange(self, items: torch.Tensor, splits: Splits, **_: str) -> torch.Tensor:
        return items.new_zeros(sum(splits.receive))

    def start(self, items: torch.Tensor, splits: Splits, **_: str) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: items.new_zeros(sum(splits.receive)))


def calls_of_a_plan(ranks: int) -> int:
    """Returns the number of function calls that a plan for `ranks` ranks makes. Each rank has one expert."""
    group = ExpertGroup("all", ranks, 0, 1, 4, 0, ("text",))
    planner = DispatchPlanner(ExpertPlacement((group,), tuple((i,) for i in range(ranks))), SilentWire(ranks))  # pyright: ignore
    assignments = Assignments(torch.arange(8), torch.arange(8) + 1, torch.ones(8))
    planner.plan(assignments, 8, "layer")  # the first plan also makes the tables
    calls = 0

    def count(frame: object, event: str, _: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        planner.plan(assignments, 8, "layer")
    finally:
        sys.setprofile(None)
    return calls


def test_the_python_of_a_plan_grows_with_the_ranks_and_not_with_their_square() -> None:
    few, many = (calls_of_a_plan(ranks) for ranks in (16, 128))
    assert many < 9 * few
