"""Process groups, made here and nowhere else: two views of the same ranks.

    world = edp x ep;  rank = edp_rank * ep + ep_rank

- `world`: dense parameters live on every rank (or are sharded over all); every rank reads data of its own.
- `ep`: one copy of all experts, sharded; neighbours in rank order, so that an EP group stays inside a node.
  Dispatch and combine run here.
- `edp`: ranks with the same position in their EP groups; they hold the same experts and sum those gradients.
- `intra_node`, `inter_node`: where ranks_per_node is given, an EP group as nodes of so many neighbours:
  ep_rank = node * ranks_per_node + local. The first joins the ranks of one node, the second those with the same `local`.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.comm.tracker import CollectiveTracker

CHECKPOINT_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Mesh:
    """The ranks as seen from one of them.

    Attributes:
        rank, world_size: Position and number of all ranks.
        ep_rank, ep_size: Position in, and size of, this rank's EP group.
        edp_rank, edp_size: Position in, and size of, the ranks that hold the same experts.
        device: Where this rank computes.
        world, ep, edp: The process groups; `ep` is None where an EP group is one rank, whose wire is the identity.
        checkpoint: All ranks once more, with gloo on the host: checkpoints are written by a thread that votes over it while
            the other groups are busy with the training.
        world_mesh, edp_mesh: The same as 1-D device meshes, for FSDP2.
        tracker: Where every collective of this rank is noted, for the watchdog.
        intra_node, inter_node: Cuts of the EP group into nodes, in the order of EP positions; None where that is one rank,
            or where no nodes were asked for.
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
        """Ranks of the world that make this rank's EP group, in the order of EP positions."""
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
    """Makes the default process group: NCCL on CUDA, gloo elsewhere.

    Args:
        store: Where the ranks meet, instead of by `init_method`.
        timeout: Seconds, for every collective.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method if store is None else None,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
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
    """Cuts the default process group into EP and edp groups. Collective: every rank calls it with the same arguments.

    With `ranks_per_node`, which must divide `ep`, each EP group is cut into nodes as well. Every group is made with the
    given timeout: torch gives a new group its own default, not the world's.
    """
    world, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if world is None or world_size % ep:
        raise AssertionError(f"{world_size} ranks cannot be cut into EP groups of {ep}")
    grid = torch.arange(world_size).view(world_size // ep, ep)
    edp_rank, ep_rank = divmod(rank, ep)
    ep_group = _own_group(grid, edp_rank, timeout) if ep > 1 else None
    edp_group = _own_group(grid.T, ep_rank, timeout)
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
    """This rank's groups inside its node and between nodes, of EP groups that are the rows of `grid`."""
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
    """Makes one group of each row of ranks, on all ranks in the same order, and returns the own one."""
    groups = [dist.new_group(row.tolist(), timeout=timedelta(seconds=timeout)) for row in rows]
    group = groups[own]
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("this rank is not in the group that was made for it")
    return group


def group_of(ranks: list[int], *, timeout: float, alone: bool = True) -> dist.ProcessGroup | None:
    """A group of some ranks: for measurements, not for training. None on a rank that is not in it.

    Args:
        alone: Only its members call this; then it must be the first group of just these ranks.
    """
    group = dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=alone)
    return group if isinstance(group, dist.ProcessGroup) else None


def _checkpoint_group() -> dist.ProcessGroup:
    """Its timeout is that of the slowest rank's write; a rank that dies is noticed at once, by its connection."""
    group = dist.new_group(backend="gloo", timeout=CHECKPOINT_TIMEOUT)
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("this rank is not in the group of all ranks")
    return group


def destroy_world() -> None:
    """Ends the default process group and all groups cut from it."""
    if dist.is_initialized():
        dist.destroy_process_group()
