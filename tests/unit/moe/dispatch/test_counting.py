"""Counting sorts of the dispatch plan equal a stable sort."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.kernels.torch_kernels import counting_order
from moe_dist.moe.routers.capacity import over_capacity
from moe_dist.moe.routing.types import Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


@pytest.mark.parametrize("num_keys", [1, 9, 256, 257, 30_000, 32_768, 32_769, 40_000, 1 << 31])
@pytest.mark.parametrize("count", [0, 1, 3_000])
def test_counting_order_is_a_stable_sort(num_keys: int, count: int) -> None:
    key_N = torch.randint(0, num_keys, (count,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counting_order(key_N, num_keys), torch.sort(key_N, stable=True).indices)


class Sorted(TorchDispatchMode):
    """Records the dtypes of comparison sorts in torch. On a CPU numpy does the counting sorts, which are not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "sort" in func.overloadpacket.__name__ or "topk" in func.overloadpacket.__name__:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_no_plan_sorts_its_pairs_and_capacity_sorts_scores_alone() -> None:
    placement = ExpertPlacement((ExpertGroup("all", 4, 0, 2, 4, 0, ("text",)),), ((0, 1, 2, 3),))
    wire = AllToAll(None, CommStats())
    expert_N = torch.tensor([3, 0, -1, 1, 1, 0])
    assignments = Assignments(torch.arange(3).repeat_interleave(2), expert_N, torch.ones(6))
    with Sorted() as sorting:
        AllToAllDispatcher(DispatchContext(placement, wire)).plan(assignments, 3)
        HierarchicalDispatcher(DispatchContext(placement, wire, hops=(wire, wire)), ranks_per_node=1).plan(assignments, 3)
        over_capacity(expert_N, torch.ones(6), torch.ones(4, dtype=torch.int64), "position")
    assert sorting.seen == []
    with Sorted() as sorting:
        over_capacity(expert_N, torch.ones(6), torch.ones(4, dtype=torch.int64), "probability")
    assert sorting.seen == [torch.float32]
