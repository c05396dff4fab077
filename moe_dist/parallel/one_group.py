"""All ranks as one EP group, for commands that use a trained model under torchrun."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_dist.parallel.mesh import Mesh, destroy_world, init_world, make_mesh
from moe_dist.runtime.environment import RankEnv

_TIMEOUT = 600.0  # timeout of every collective, in seconds


@contextmanager
def one_group(env: RankEnv, device: torch.device) -> Iterator[tuple[Mesh | None, torch.device]]:
    """The mesh with all ranks in one EP group, and this rank's device; the mesh is None for a single rank."""
    if env.world_size == 1:
        yield None, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", env.local_rank)
        torch.cuda.set_device(device)
    init_world(env.init_method, rank=env.rank, world_size=env.world_size, device=device, timeout=_TIMEOUT)
    try:
        yield make_mesh(ep=env.world_size, device=device, timeout=_TIMEOUT), device
    finally:
        destroy_world()
