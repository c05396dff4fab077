"""AdamW in one fused kernel a group: torch's, or NVIDIA Apex's where it is installed; and the state both share."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_dist.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    groups: Sequence[dict[str, Any]],
    *,
    backend: Literal["auto", "torch", "apex"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> Optimizer:
    """AdamW (decoupled decay, Loshchilov & Hutter 2019) over groups as `split_parameters` makes them.

    Args:
        weight_decay: For groups that name none of their own.

    Raises:
        ConfigError: backend=apex where Apex is missing or cannot take the parameters.
    """
    apex_adam = _apex_fused_adam() if backend != "torch" else None
    parameters = [parameter for group in groups for parameter in group["params"]]
    obstacle = _apex_obstacle(apex_adam, parameters)
    if backend == "apex" and obstacle:
        raise ConfigError(f"optimizer.backend=apex: {obstacle}")
    if apex_adam is not None and not obstacle:
        return apex_adam(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)
    # torch refuses an empty list; a rank whose every parameter lies elsewhere still takes part in each step.
    return torch.optim.AdamW(groups or [{"params": []}], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def _apex_fused_adam() -> Callable[..., Optimizer] | None:
    # The package that the Python index calls apex is another project: the attribute decides.
    try:
        return getattr(importlib.import_module("apex.optimizers"), "FusedAdam", None)
    except ImportError:
        return None


def _apex_obstacle(apex_adam: Callable[..., Optimizer] | None, parameters: Sequence[torch.Tensor]) -> str | None:
    if apex_adam is None:
        return (
            "NVIDIA Apex is not installed (no apex.optimizers.FusedAdam; the package `apex` on the Python index is another "
            "project); build it from NVIDIA's repository, or set optimizer.backend=torch"
        )
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "its kernels cannot take FSDP2's sharded parameters; set parallel.data=ddp or optimizer.backend=torch"
    if any(parameter.device.type != "cuda" for parameter in parameters):
        return "its kernels need parameters on CUDA; set parallel.device=cuda or optimizer.backend=torch"
    return None


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def materialise_moments(optimizer: Optimizer) -> None:
    """Creates the moments (zeros) and step counts (0) that the first step would create, to be saved or loaded into.

    A later first step finds them and does what it would have done: zeros and a count of 0 are its own starting values.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if not _counts_by_group(optimizer) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def step_count(optimizer: Optimizer) -> int:
    """Steps that the optimizer has taken; every parameter takes part in every step, so they share one count.

    Costs a host sync on CUDA. A count that differs between parameters is a bug of ours.
    """
    if _counts_by_group(optimizer):
        counts = {int(group.get("step", 0)) for group in optimizer.param_groups}
    else:
        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        counts = set(torch.stack(steps).long().tolist()) if steps else {0}
    assert len(counts) == 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
    return counts.pop()


def set_step_count(optimizer: Optimizer, count: int) -> None:
    """Sets the number of steps taken, which the bias correction of the moments depends on."""
    if _counts_by_group(optimizer):
        for group in optimizer.param_groups:
            group["step"] = count
    else:
        for state in optimizer.state.values():
            state["step"].fill_(count)


def _counts_by_group(optimizer: Optimizer) -> bool:
    # Apex keeps one count a group; torch one tensor a parameter.
    return not isinstance(optimizer, torch.optim.AdamW)
