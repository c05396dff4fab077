"""The worlds of ranks: order of results, reuse, first causes, hangs."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.support.worlds import RankContext, WorldError, Worlds

pytestmark = pytest.mark.slow


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


def fail_on_both(rank: RankContext) -> None:
    time.sleep(0.4 * (1 - rank.rank))
    raise ValueError(f"of rank {rank.rank}")


def die_on_one(rank: RankContext) -> None:
    if rank.rank == 1:
        os._exit(9)
    dist.barrier()


def the_place_where_it_hangs() -> None:
    time.sleep(1000)


def hang_on_one(rank: RankContext) -> None:
    if rank.rank == 0:
        the_place_where_it_hangs()
    dist.barrier()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("body", "seconds", "expected"),
    [
        (fail_on_one, 600.0, ["rank 1 of 2 failed", "fail_on_one", "assert 3 == 4"]),
        pytest.param(fail_on_both, 600.0, ["rank 1 of 2 failed", "of rank 1"], marks=pytest.mark.full),
        pytest.param(die_on_one, 600.0, ["rank 1 of 2 died with exit code 9"], marks=pytest.mark.full),
        pytest.param(
            hang_on_one,
            5.0,
            ["ranks [0, 1] of 2 did not answer within 5 s", "the_place_where_it_hangs"],
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_failure_tells_its_first_cause_and_the_world_is_built_anew(
    worlds: Worlds, body: object, seconds: float, expected: list[str]
) -> None:
    worlds.run(2, summed, [0.0, 0.0])
    pids = worlds.pids(2)
    with pytest.raises(WorldError) as caught:
        worlds.run(2, body, seconds=seconds)  # pyright: ignore[reportArgumentType]
    for part in expected:
        assert part in str(caught.value)
    assert not any(is_alive(pid) for pid in pids)
    assert worlds.run(2, summed, [1.0, 1.0])[1].total.item() == 2.0
    assert not set(pids) & set(worlds.pids(2))
