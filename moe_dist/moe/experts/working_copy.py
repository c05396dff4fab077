"""Converts the weights of experts to the dtype of the rows, and keeps the copies for several forward passes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def working_copy(copies: dict[str, Tensor], name: str, dtype: torch.dtype, *weights: Tensor) -> Tensor:
    """Returns the weights in `dtype`, joined along dim 1, with gradient. Uses the copy `name` in `copies`, or makes this
    copy and stores it there. One joined copy costs as much memory as separate copies."""
    copy = copies.get(name)
    if copy is None or copy.dtype != dtype:
        first, widths = weights[0].detach(), [each.shape[1] for each in weights]
        copy = copies[name] = first.new_empty((len(first), sum(widths), *first.shape[2:]), dtype=dtype)
        for part, weight in zip(copy.split(widths, dim=1), weights, strict=True):
            part.copy_(weight.detach())
    return _WorkingCopy.apply(copy, *weights)  # pyright: ignore[reportReturnType]


class _WorkingCopy(torch.autograd.Function):
    """Replaces one or more weights by a copy in a different dtype, joined along dim 1. Backward passes the copy's gradient
    to the weights, in the weights' dtype. If a weight already has a gradient, one pass converts and adds the new one in
    place."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights  # not save_for_backward, because backward does not need the parameters' values
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = gradient.split([each.shape[1] for each in ctx.weights], dim=1)
        return None, *map(_added_or_converted, ctx.weights, parts)


def _added_or_converted(weight: Tensor, gradient: Tensor) -> Tensor | None:
    if weight.grad is None:
        return gradient.to(weight.dtype)
    weight.grad.add_(gradient)
    return None
