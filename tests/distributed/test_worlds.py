"""A failure in a world of ranks shows its first cause, and the world is built anew."""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.support.worlds import RankContext, WorldError, Worlds


@dataclass(frozen=True)
class Answer:
    rank: int
    total: torch.Tensor


def summed(rank: RankContext, values: list[float]) -> Answer:
    total = torch.tensor([values[rank.rank]])
    dist.all_reduce(total)
    return Answer(rank.rank, total)


def fail_on_one(rank: RankContext) -> None:
    if rank.rank == 1:
        left, right = 3, 4
        assert left == right
    dist.barrier()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_failure_tells_its_first_cause_and_the_world_is_built_anew(worlds: Worlds) -> None:
    worlds.run(2, summed, [0.0, 0.0])
    pids = worlds.pids(2)
    with pytest.raises(WorldError) as caught:
        worlds.run(2, fail_on_one)
    for part in ("rank 1 of 2 failed", "fail_on_one", "assert 3 == 4"):
        assert part in str(caught.value)
    assert not any(is_alive(pid) for pid in pids)
    assert worlds.run(2, summed, [1.0, 1.0])[1].total.item() == 2.0
    assert not set(pids) & set(worlds.pids(2))
