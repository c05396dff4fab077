"""The check for rows in flight in `gpu-check` reports each forbidden access to such rows, and accepts allowed accesses."""

from collections.abc import Callable
from typing import Any

import torch

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.parallel.mesh import make_mesh
from tests.support.worlds import RankContext
from tools.gpu_check.races import InFlight


def touches(rank: RankContext) -> list[str]:
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    counts = tuple(0 if other == rank.rank else 3 for other in range(rank.world_size))
    rows, items, found = torch.zeros(5, 4), torch.ones(3, 4), []
    with InFlight().watching():
        pending = AllToAll(mesh.ep, CommStats()).start(items, Splits(counts, counts), name="rows", out=rows[2:])
        trials: dict[str, Callable[[], Any]] = {
            "reads arriving rows": lambda: rows.sum(),
            "writes arriving rows": lambda: rows[4].zero_(),
            "writes them as a result": lambda: torch.index_select(items, 0, torch.tensor([0, 1]), out=rows[2:4]),
            "writes sent items": lambda: items[1].add_(1.0),
            "reads own rows": lambda: rows[:2].sum(),
            "writes own rows": lambda: rows[:2].fill_(1.0),
            "reads sent items": lambda: items + 1.0,
        }
        for name, touch in trials.items():
            try:
                touch()
            except AssertionError as error:
                found.append(name if "rows of a layer" in str(error) else str(error))
        pending.wait()
        items.zero_()
        assert rows.sum() == 8.0 + 12.0
    return found


def test_a_touch_of_rows_in_flight_is_refused(run_in_world: Callable[..., list[Any]]) -> None:
    wrong = ["reads arriving rows", "writes arriving rows", "writes them as a result", "writes sent items"]
    assert run_in_world(2, touches) == [wrong, wrong]
