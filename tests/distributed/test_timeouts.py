"""Every process group of the training has the configured timeout, except the group of the thread that writes
checkpoints. A group without the configured timeout would have torch's default timeout.

The threads that write checkpoints wait for the slowest disk. When the training waits for a save, the watchdog counts the
wait as a collective and limits it.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.parallel.mesh import CHECKPOINT_TIMEOUT, make_mesh
from tests.support.worlds import RankContext

TIMEOUT = 47.0


def timeouts(rank: RankContext, ep: int, ranks_per_node: int | None) -> dict[str, timedelta]:
    """Returns the timeout of each group of a mesh, as its backend reports it, by the group's purpose."""
    before = set(dist.distributed_c10d._world.pg_map)
    mesh = make_mesh(ep=ep, device=torch.device("cpu"), timeout=TIMEOUT, ranks_per_node=ranks_per_node)
    groups = [group for group in dist.distributed_c10d._world.pg_map if group not in before]
    if ranks_per_node:
        assert {mesh.intra_node, mesh.inter_node} <= set(groups)
    return {
        "checkpoint" if group is mesh.checkpoint else f"{number} of {group.size()} ranks": _timeout(group)
        for number, group in enumerate(groups)
    }


def _timeout(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize(("ep", "ranks_per_node", "least"), [(2, None, 2), (4, 2, 4)], ids=["EP and edp", "nodes too"])
def test_groups_inherit_the_configured_timeout(
    run_in_world: Callable[..., list[Any]], ep: int, ranks_per_node: int | None, least: int
) -> None:
    for seen in run_in_world(4, timeouts, ep, ranks_per_node):
        assert seen.pop("checkpoint") == CHECKPOINT_TIMEOUT
        assert len(seen) >= least
        assert set(seen.values()) == {timedelta(seconds=TIMEOUT)}, seen
