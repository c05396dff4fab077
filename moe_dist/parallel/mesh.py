"""Process groups, made here and nowhere else: two views of the same ranks.

    world = edp x ep;  rank = edp_rank * ep + ep_rank

- `world`: dense parameters live on every rank (or are sharded over all); every rank reads data of its own.
- `ep`: one copy of all experts, sharded; neighbours in rank order, so that an EP group stays inside a node.
  Dispatch and combine run here.
- `edp`: ranks with the same position in their EP groups; they hold the same experts and sum those gradients.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.comm.watch import Watch

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
        watch: Where every collective of this rank is noted, for the watchdog.
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
    watch: Watch


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


def make_mesh(*, ep: int, device: torch.device, timeout: float, watch: Watch | None = None) -> Mesh:
    """Cuts the default process group into EP and edp groups. Collective: every rank calls it with the same `ep`.

    Every group is made with the given timeout: torch gives a new group its own default, not the world's.
    """
    world, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if world is None or world_size % ep:
        raise AssertionError(f"{world_size} ranks cannot be cut into EP groups of {ep}")
    grid = torch.arange(world_size).view(world_size // ep, ep)
    edp_rank, ep_rank = divmod(rank, ep)
    ep_group = _own_group(grid, edp_rank, timeout) if ep > 1 else None
    edp_group = _own_group(grid.T, ep_rank, timeout)
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
        watch=watch or Watch(),
    )


def _own_group(rows: torch.Tensor, own: int, timeout: float) -> dist.ProcessGroup:
    """Makes one group of each row of ranks, on all ranks in the same order, and returns the own one."""
    groups = [dist.new_group(row.tolist(), timeout=timedelta(seconds=timeout)) for row in rows]
    group = groups[own]
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("this rank is not in the group that was made for it")
    return group


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
