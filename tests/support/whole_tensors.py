"""Loads the logical tensors of a model on many ranks from a checkpoint, or gathers them."""

from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import capture
from moe_dist.parallel.initialise import logical_expert_names
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.parameter_names import EXPERTS
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.training import rank_layout


def carry(
    folder: Path, parallel: ParallelModel, optimizer: torch.optim.Optimizer, placement: ExpertPlacement, mesh: Mesh
) -> None:
    """Gives all layouts the same initial weights: saves a checkpoint if there is none, else loads it over NaN."""
    state = capture(parallel.model, optimizer, rank_layout(placement, mesh))
    manager = CheckpointManager(folder, keep=1, lease_check=lambda: None, process_group=mesh.checkpoint)
    newest = manager.latest()
    if newest is None:
        manager.save(0, state)
        return
    with torch.no_grad():
        for info in parallel.parameters:
            local = info.parameter.to_local() if isinstance(info.parameter, DTensor) else info.parameter
            local.fill_(float("nan"))
    manager.load(newest, state)


def logical(parallel: ParallelModel, placement: ExpertPlacement, mesh: Mesh, *, gradient: bool) -> dict[str, np.ndarray]:
    """Returns full tensors by logical name: this rank's experts, and all dense parameters. Collective under FSDP2."""
    named: dict[str, np.ndarray] = {}
    for info in parallel.parameters:
        tensor = info.parameter.grad if gradient else info.parameter.detach()
        if tensor is None and (info.parameter.numel() == 0 or not info.parameter.requires_grad):
            continue  # an empty stack, or a frozen parameter
        assert tensor is not None, f"{info.name} has no gradient"
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()
        if info.role in EXPERTS:
            named.update(zip(logical_expert_names(info.name, placement, mesh.ep_rank), whole, strict=True))
        else:
            named[info.name] = whole
    return named
