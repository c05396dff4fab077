"""Creates all process groups. No other file creates process groups. Ranks are numbered as follows:

    world = edp x ep;  rank = edp_rank * ep + ep_rank

- `world`: all ranks. Each rank reads different data. Dense parameters are replicated on, or sharded over, all ranks.
- `ep`: ranks that together have one copy of all experts. The ranks of an EP group are consecutive, so that the group stays
  inside a node where possible. Dispatch and combine run in the EP group.
- `edp`: ranks with the same ep_rank. The ranks of an edp group have the same experts and sum their gradients.
- `intra_node`, `inter_node`: exist only if ranks_per_node is set. ep_rank = node * ranks_per_node + local. `intra_node` has
  the ranks of an EP group with the same `node`, `inter_node` the ranks of an EP group with the same `local`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime.environment import PUBLISHED, RankEnv

CHECKPOINT_TIMEOUT = timedelta(hours=2)  # longer than the slowest rank needs to write a checkpoint
_ONE_GROUP_TIMEOUT = 600.0  # timeout of every collective, in seconds


@dataclass(frozen=True)
class Mesh:
    """This process's ranks in the world and in the process groups, and the process groups themselves.

    Attributes:
        ep: Process group of the EP ranks; None for a single EP rank, which needs no communication.
        checkpoint: A gloo group of all ranks for the checkpoint thread, which runs while training uses all other groups.
        world_mesh, edp_mesh: `world` and `edp` as 1-D device meshes, for FSDP2.
        tracker: Records all collectives of this rank, for the watchdog.
        intra_node, inter_node: Process groups ordered by ep_rank. None if ranks_per_node is None or the group has one rank.
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
        """Returns the global ranks of this rank's EP group, ordered by ep_rank."""
        return tuple(range(self.edp_rank * self.ep_size, (self.edp_rank + 1) * self.ep_size))


def init_world(
    init_method: str,
    store: dist.Store | None = None,  # pyright: ignore[reportPrivateImportUsage]
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout: float,
    backend: str | None = None,
) -> None:
    """Creates the default process group, with `backend` or by default NCCL on CUDA and gloo on CPU. `timeout` limits every
    collective, in seconds. Ranks connect through `store`, or through `init_method` if `store` is None."""
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if store is not None:
        store.set_timeout(timedelta(seconds=timeout))
    dist.init_process_group(
        backend,
        init_method=init_method if store is None else None,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if backend == "nccl" else None,  # opens NCCL's connections now, so that errors appear early
    )


def pretend_world(*, rank: int, world_size: int) -> None:
    """Creates a default process group without peers, whose collectives do nothing. Use it to count the work of one rank."""
    # imported here, because the import registers a backend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)  # pyright: ignore[reportArgumentType]


def make_mesh(
    *,
    ep: int,
    device: torch.device,
    timeout: float,
    ranks_per_node: int | None = None,
    tracker: CollectiveTracker | None = None,
) -> Mesh:
    """Divides the default process group into EP and edp groups. Every rank must call `make_mesh` with the same arguments.

    If `ranks_per_node` is given, it must divide `ep`, and each EP group is also divided into nodes. Each group gets
    `timeout` explicitly, because torch's groups do not inherit the timeout of the default group.
    """
    world, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if world is None or world_size % ep:
        raise AssertionError(f"{world_size} ranks cannot be cut into EP groups of {ep}")
    grid = torch.arange(world_size).view(world_size // ep, ep)
    edp_rank, ep_rank = divmod(rank, ep)
    ep_group = _own_group(grid, edp_rank, timeout) if ep > 1 else None
    edp_group = _own_group(grid.T, ep_rank, timeout)  # created even if it has one rank, because FSDP2 needs the edp mesh
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
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
        # The timeout may be long: if a rank dies, its connections close, and this ends the wait of the other ranks.
        checkpoint=dist.new_group(backend=backend, timeout=CHECKPOINT_TIMEOUT),  # pyright: ignore[reportArgumentType]
        world_mesh=DeviceMesh.from_group(world, device.type, mesh_dim_names=("world",)),
        edp_mesh=DeviceMesh.from_group(edp_group, device.type, mesh_dim_names=("edp",)),
        tracker=tracker or CollectiveTracker(),
        intra_node=intra_node,
        inter_node=inter_node,
    )


def _node_groups(
    grid: torch.Tensor, rank: int, ranks_per_node: int | None, timeout: float
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Returns this rank's groups inside its node and between nodes. A row of `grid` has the ranks of an EP group."""
    if ranks_per_node is None:
        return None, None
    ep = grid.shape[1]
    if ep % ranks_per_node:
        raise AssertionError(f"an EP group of {ep} ranks cannot be cut into nodes of {ranks_per_node}")
    cube = grid.view(-1, ep // ranks_per_node, ranks_per_node)  # [EP group, node, local]
    nodes, rails = cube.flatten(0, 1), cube.transpose(1, 2).flatten(0, 1)
    intra = _own_group(nodes, _row_of(nodes, rank), timeout) if nodes.shape[1] > 1 else None
    inter = _own_group(rails, _row_of(rails, rank), timeout) if rails.shape[1] > 1 else None
    return intra, inter


def _row_of(rows: torch.Tensor, rank: int) -> int:
    return int((rows == rank).any(1).nonzero()[0])


def _own_group(rows: torch.Tensor, own: int, timeout: float) -> dist.ProcessGroup:
    """Creates a process group for each row of ranks, and returns the group of the row with index `own`. All ranks create
    all groups in one order, as `dist.new_group` requires."""
    groups = [dist.new_group(row.tolist(), timeout=timedelta(seconds=timeout)) for row in rows]
    group = groups[own]
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("this rank is not in the group that was made for it")
    return group


def group_of(ranks: list[int], *, timeout: float, alone: bool = True) -> dist.ProcessGroup | None:
    """Creates a process group of `ranks`, for measurements. Returns None on ranks outside the group. With `alone`, only
    `ranks` call this function, and no earlier process group may have exactly the same ranks."""
    group = dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=alone)
    return group if isinstance(group, dist.ProcessGroup) else None


def destroy_world() -> None:
    """Destroys the default process group and all its subgroups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_gpu(env: RankEnv) -> torch.device:
    """Returns this rank's GPU, and makes it the current device. It is the GPU whose index is the local rank. If the rank
    sees only one GPU, as with srun --gpus-per-task, it is that GPU. Raises ResourceError if the node shows no GPU, or shows
    several GPUs but fewer than it has ranks."""
    index = 0 if torch.cuda.device_count() == 1 else env.local_rank
    if index >= torch.cuda.device_count():
        raise ResourceError(
            f"rank {env.rank} is number {env.local_rank} on its node, which shows {torch.cuda.device_count()} GPUs "
            "(CUDA_VISIBLE_DEVICES); start fewer ranks there, or use the CPU (parallel.device=cpu, --device cpu)"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)  # NCCL and torch.cuda.current_stream use the current device
    return device


@contextmanager
def one_group(env: RankEnv, device: torch.device) -> Iterator[tuple[Mesh | None, torch.device]]:
    """Puts all ranks into one EP group, for commands that use a trained model. Yields this rank's mesh (None if there is
    only one rank) and device.

    Raises:
        ConfigError: the address of rank 0 is not set on the ranks.
        ResourceError: see `own_gpu`.
    """
    if env.world_size == 1:
        yield None, device
        return
    if env.init_method == PUBLISHED:
        raise ConfigError("MASTER_ADDR and MASTER_PORT are not set; several ranks need rank 0's address and a port")
    if device.type == "cuda":
        device = own_gpu(env)
    init_world(env.init_method, rank=env.rank, world_size=env.world_size, device=device, timeout=_ONE_GROUP_TIMEOUT)
    try:
        yield make_mesh(ep=env.world_size, device=device, timeout=_ONE_GROUP_TIMEOUT), device
    finally:
        destroy_world()
