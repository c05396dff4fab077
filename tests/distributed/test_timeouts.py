"""Every process group has the configured timeout: torch gives a new group its own default, not the world's."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel.mesh import make_mesh
from tests.support.worlds import RankContext

TIMEOUT = 47.0


def timeouts(rank: RankContext) -> dict[str, timedelta]:
    """Timeout of every group that a mesh makes, as its backend has it, by the group's number."""
    before = set(dist.distributed_c10d._world.pg_map)
    make_mesh(ep=2, device=torch.device("cpu"), timeout=TIMEOUT)
    groups = [group for group in dist.distributed_c10d._world.pg_map if group not in before]
    assert isinstance(dist.group.WORLD, dist.ProcessGroup)
    return {
        f"{number} of {group.size()}": group._get_backend(torch.device("cpu")).options._timeout
        for number, group in enumerate(groups)
    }


def test_groups_inherit_the_configured_timeout(run_in_world: Callable[..., list[Any]]) -> None:
    for seen in run_in_world(4, timeouts):
        assert len(seen) >= 2  # EP and edp
        assert set(seen.values()) == {timedelta(seconds=TIMEOUT)}, seen
