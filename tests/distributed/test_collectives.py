"""`max_over` returns the largest value of a group's ranks, and an exchange counts the bytes that it sends to other
ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats, max_over
from tests.support.worlds import RankContext


def largest(rank: RankContext) -> tuple[list[float], list[float]]:
    values = torch.tensor([float(rank.rank), -1.0 - rank.rank])
    return max_over(values.clone(), dist.group.WORLD).tolist(), max_over(values, None).tolist()


def test_ranks_get_the_largest_value_of_all_ranks(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, largest) == [([1.0, -1.0], [0.0, -1.0]), ([1.0, -1.0], [1.0, -2.0])]


def exchanged(rank: RankContext) -> tuple[list[int], int]:
    """Each rank has three items: one for rank 0 and two for rank 1."""
    wire = AllToAll(dist.group.WORLD, CommStats())
    items = torch.arange(3) + 10 * rank.rank
    received = wire.exchange(items, Splits(send=(1, 2), receive=(1 + rank.rank,) * 2), name="items")
    return received.tolist(), wire.comm_stats.metadata_bytes


def test_bytes_to_other_ranks_alone_are_counted(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, exchanged) == [([0, 10], 2 * 8), ([1, 2, 11, 12], 1 * 8)]
