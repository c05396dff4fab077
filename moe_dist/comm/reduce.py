"""Reductions over a process group; without a group (one rank) they return what they were given.

With a `tracker` the watchdog knows of them, under their `name`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.tracker import CollectiveTracker, track_collective


def sum_over(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str = "sum", tracker: CollectiveTracker | None = None
) -> Tensor:
    """Sum of `tensor` over the ranks of `group`, in place; the same bits on every rank."""
    if group is not None:
        with track_collective(tracker, name, device=tensor.device):
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def max_over(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str = "maximum", tracker: CollectiveTracker | None = None
) -> Tensor:
    """Maximum of `tensor` over the ranks of `group`, in place."""
    if group is not None:
        with track_collective(tracker, name, device=tensor.device):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def sum_gradients(
    parameters: list[torch.nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    name: str = "gradients",
    tracker: CollectiveTracker | None = None,
) -> None:
    """Sums the gradients of `parameters` over `group`, in place, one all-reduce each: for few large tensors."""
    for gradient in _gradients(parameters):
        sum_over(gradient, group, name=name, tracker=tracker)


def sum_small_gradients(
    parameters: list[torch.nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    name: str = "gradients",
    tracker: CollectiveTracker | None = None,
) -> None:
    """The same in one all-reduce of a concatenated copy: for many small tensors."""
    gradients = _gradients(parameters)
    if group is None or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat = sum_over(flat, group, name=name, tracker=tracker)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """All gradients; a missing one would make ranks disagree about what is summed, so it is an error."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(gradients) != len(parameters):
        raise AssertionError("a parameter has no gradient; an expert without rows must get zeros")
    return gradients
