"""All process groups. Only this file creates them.

    world = edp x ep;  rank = edp_rank * ep + ep_rank

- `world`: all ranks; each reads different data. Dense parameters are replicated, or sharded over all ranks.
- `ep`: the ranks that share one copy of all experts. They are consecutive, so that an EP group stays inside a node.
  Dispatch and combine run in this group.
- `edp`: the ranks with the same ep_rank. They hold the same experts, and sum their gradients.
- `intra_node`, `inter_node`: with ranks_per_node, an EP group is divided into nodes of that many consecutive ranks:
  ep_rank = node * ranks_per_node + local. `intra_node` contains the ranks of one node, `inter_node` those with the same
  `local`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.runtime.environment import RankEnv

CHECKPOINT_TIMEOUT = timedelta(hours=2)
_ONE_GROUP_TIMEOUT = 600.0  # timeout of every collective, in seconds


@dataclass(frozen=True)
class Mesh:
    """Ranks and process groups of one process.

    Attributes:
        rank, world_size: Global rank and number of ranks.
        ep_rank, ep_size: Rank in, and size of, the EP group.
        edp_rank, edp_size: Rank among, and number of, the ranks with the same experts.
        device: Device of this rank.
        world, ep, edp: The process groups; `ep` is None for an EP group of one rank, which communicates nothing.
        checkpoint: A gloo group of all ranks for the checkpoint thread, because the training uses the other groups at the
            same time.
        world_mesh, edp_mesh: `world` and `edp` as 1-D device meshes, for FSDP2.
        tracker: Tracks all collectives of this rank, for the watchdog.
        intra_node, inter_node: Groups inside a node and between nodes, ordered by ep_rank; None for a single rank, or
            without ranks_per_node.
    """

    rank: int
    world_size: int
    ep_rank: int
    ep_size: int
    edp_rank: int
    edp_size: int
    device: torch.device
    world: dist.ProcessGroup
    ep: dist.ProcessGroup | None
    edp: dist.ProcessGroup
    checkpoint: dist.ProcessGroup
    world_mesh: DeviceMesh
    edp_mesh: DeviceMesh
    tracker: CollectiveTracker
    intra_node: dist.ProcessGroup | None = None
    inter_node: dist.ProcessGroup | None = None

    @property
    def ep_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's EP group, ordered by ep_rank."""
        return tuple(range(self.edp_rank * self.ep_size, (self.edp_rank + 1) * self.ep_size))


def init_world(
    init_method: str,
    store: dist.Store | None = None,  # pyright: ignore[reportPrivateImportUsage]
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout: float,
) -> None:
    """Creates the default process group: NCCL on CUDA, otherwise gloo.

    Args:
        store: Store for the rendezvous; None uses `init_method`.
        timeout: Timeout of every collective, in seconds.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method if store is None else None,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        # opens NCCL's connections now, so that errors show at the start
        device_id=device if device.type == "cuda" else None,
    )


def make_mesh(
    *,
    ep: int,
    device: torch.device,
    timeout: float,
    ranks_per_node: int | None = None,
    tracker: CollectiveTracker | None = None,
) -> Mesh:
    """Divides the default process group into EP and edp groups. Collective: every rank calls it with the same arguments.

    With `ranks_per_node`, which must divide `ep`, it also divides each EP group into nodes. Every group gets `timeout`
    explicitly, because torch does not inherit it from the default group.
    """
    world, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if world is None or world_size % ep:
        raise AssertionError(f"{world_size} ranks cannot be cut into EP groups of {ep}")
    grid = torch.arange(world_size).view(world_size // ep, ep)
    edp_rank, ep_rank = divmod(rank, ep)
    ep_group = _own_group(grid, edp_rank, timeout) if ep > 1 else None
    edp_group = _own_group(grid.T, ep_rank, timeout)  # also with one rank, because FSDP2 needs a mesh
    intra_node, inter_node = _node_groups(grid, rank, ranks_per_node, timeout)
    return Mesh(
        rank=rank,
        world_size=world_size,
        ep_rank=ep_rank,
        ep_size=ep,
        edp_rank=edp_rank,
        edp_size=world_size // ep,
        device=device,
        world=world,
        ep=ep_group,
        edp=edp_group,
        checkpoint=_checkpoint_group(),
        world_mesh=DeviceMesh.from_group(world, device.type, mesh_dim_names=("world",)),
        edp_mesh=DeviceMesh.from_group(edp_group, device.type, mesh_dim_names=("edp",)),
        tracker=tracker or CollectiveTracker(),
        intra_node=intra_node,
        inter_node=inter_node,
    )


def _node_groups(
    grid: torch.Tensor, rank: int, ranks_per_node: int | None, timeout: float
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """This rank's groups inside its node and between nodes; the rows of `grid` are the EP groups."""
    if ranks_per_node is None:
        return None, None
    ep = grid.shape[1]
    if ep % ranks_per_node:
        raise AssertionError(f"an EP group of {ep} ranks cannot be cut into nodes of {ranks_per_node}")
    cube = grid.view(-1, ep // ranks_per_node, ranks_per_node)  # EP group, node, local
    nodes, rails = cube.flatten(0, 1), cube.transpose(1, 2).flatten(0, 1)
    intra = _own_group(nodes, _row_of(nodes, rank), timeout) if nodes.shape[1] > 1 else None
    inter = _own_group(rails, _row_of(rails, rank), timeout) if rails.shape[1] > 1 else None
    return intra, inter


def _row_of(rows: torch.Tensor, rank: int) -> int:
    return int((rows == rank).any(1).nonzero()[0])


def _own_group(rows: torch.Tensor, own: int, timeout: float) -> dist.ProcessGroup:
    """Creates a group for each row of ranks and returns this rank's own. All ranks create them in the same order, as
    `dist.new_group` requires."""
    groups = [dist.new_group(row.tolist(), timeout=timedelta(seconds=timeout)) for row in rows]
    group = groups[own]
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("this rank is not in the group that was made for it")
    return group


def group_of(ranks: list[int], *, timeout: float, alone: bool = True) -> dist.ProcessGroup | None:
    """A group of some ranks, for measurements; None on a rank outside it.

    Args:
        alone: Only the members call this; then it must be the first group of exactly these ranks.
    """
    group = dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=alone)
    return group if isinstance(group, dist.ProcessGroup) else None


def _checkpoint_group() -> dist.ProcessGroup:
    """The group of the checkpoint thread. Its long timeout covers the slowest rank's write; the death of a rank is noticed
    immediately by its closed connection."""
    group = dist.new_group(backend="gloo", timeout=CHECKPOINT_TIMEOUT)
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("this rank is not in the group of all ranks")
    return group


def destroy_world() -> None:
    """Destroys the default process group and all its subgroups."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_group(env: RankEnv, device: torch.device) -> Iterator[tuple[Mesh | None, torch.device]]:
    """For commands that use a trained model: the mesh with all ranks in one EP group, None for a single rank; and this
    rank's device."""
    if env.world_size == 1:
        yield None, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", env.local_rank)
        torch.cuda.set_device(device)
    init_world(env.init_method, rank=env.rank, world_size=env.world_size, device=device, timeout=_ONE_GROUP_TIMEOUT)
    try:
        yield make_mesh(ep=env.world_size, device=device, timeout=_ONE_GROUP_TIMEOUT), device
    finally:
        destroy_world()
