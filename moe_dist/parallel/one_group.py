"""All processes of torchrun as one EP group, for commands that use a trained model over several ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_dist.parallel.mesh import Mesh, destroy_world, init_world, make_mesh
from moe_dist.runtime.environment import RankEnv

_TIMEOUT = 600.0  # seconds, of every collective


@contextmanager
def one_group(env: RankEnv, device: torch.device) -> Iterator[tuple[Mesh | None, torch.device]]:
    """All ranks as one EP group, and this rank's device; no mesh for one rank."""
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
