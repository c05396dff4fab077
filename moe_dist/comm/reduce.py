"""Reductions over a process group; without a group (one rank) they return what they were given."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of `tensor` over the ranks of `group`, in place; the same bits on every rank."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def max_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Maximum of `tensor` over the ranks of `group`, in place."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def any_over(flag: bool, group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether `flag` is set on any rank of `group`: a vote, one small all-reduce and one host sync."""
    return bool(max_over(torch.tensor(int(flag), device=device), group).item())


def sum_gradients(parameters: list[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sums the gradients of `parameters` over `group` in one all-reduce of their concatenation.

    Every parameter must have a gradient: a missing one would shift all the others, so it is an error.
    """
    if group is None or not parameters:
        return
    gradients = [parameter.grad for parameter in parameters]
    if any(gradient is None for gradient in gradients):
        raise AssertionError("sum_gradients: a parameter has no gradient; an expert without rows must get zeros")
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
    at = 0
    for gradient in gradients:
        if gradient is not None:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
