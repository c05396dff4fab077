"""`max_over` returns the largest value of a group's ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.comm.collectives import max_over
from tests.support.worlds import RankContext


def largest(rank: RankContext) -> tuple[list[float], list[float]]:
    values = torch.tensor([float(rank.rank), -1.0 - rank.rank])
    return max_over(values.clone(), dist.group.WORLD).tolist(), max_over(values, None).tolist()


def test_ranks_get_the_largest_value_of_all_ranks(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, largest) == [([1.0, -1.0], [0.0, -1.0]), ([1.0, -1.0], [1.0, -2.0])]
