"""The kernels of dense parts in Triton. Shape letters: B sequences, H heads, S positions, d head width, V vocabulary."""

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.model import layers
from moe_dist.model.kernels import norm, rotary
from moe_dist.model.kernels.cross_entropy import cross_entropy, cross_entropy_backward
from moe_dist.model.kernels.interface import DenseKernels
from moe_dist.model.kernels.normed_rotary import normed_rotary, normed_rotary_backward
from moe_dist.model.layers import Projection, RMSNorm, RopePairs

logger = logging.getLogger(__name__)


def _rotate(x_BHSd: Tensor, table: tuple[Tensor, Tensor], pairs: RopePairs = "halves") -> Tensor:
    # The transposes copy nothing. A projection has written x in the memory order [B, S, H, d], which the kernel needs.
    batch, _, length, _ = x_BHSd.shape
    cos, sin = _per_token(table, batch, length)
    return _Rotate.apply(x_BHSd.transpose(1, 2), cos, sin, pairs == "adjacent").transpose(1, 2)  # pyright: ignore


def _norm_and_rotate(
    x_BSHd: Tensor, weight: Tensor, eps: float, table: tuple[Tensor, Tensor], pairs: RopePairs
) -> Tensor | None:
    """Returns None if only part of a head rotates, or if all heads together are too wide for the kernel."""
    batch, length, heads, width = x_BSHd.shape
    if 2 * table[0].shape[-1] != width or heads * width > norm.LARGEST:
        return None
    cos, sin = _per_token(table, batch, length)
    return _NormAndRotate.apply(x_BSHd, weight, cos, sin, eps, pairs == "adjacent").transpose(1, 2)  # pyright: ignore


def _per_token(table: tuple[Tensor, Tensor], batch: int, length: int) -> Iterator[Tensor]:
    """Yields cosines and sines [B S, r / 2]. The table may have one sequence's angles for all B sequences."""
    return (each.expand(batch, 1, length, -1).flatten(0, 2) for each in table)


def _token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return _TokenLosses.apply(logits_BSV, labels_BS)  # pyright: ignore[reportReturnType]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape[-1] > norm.LARGEST:
        _warn_of_wide_norms(x.shape[-1])
        return layers.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps, False)[0]  # pyright: ignore[reportIndexIssue]


def _norm_for_router(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.shape[-1] > norm.LARGEST or x.dtype == torch.float32:
        return (normed := _rms_norm(x, weight, eps)), normed
    return _RMSNorm.apply(x, weight, eps, True)  # pyright: ignore[reportReturnType]


def _project(x: Tensor, normed: RMSNorm, *projections: Projection) -> tuple[Tensor, ...]:
    if any(each.bias is not None for each in projections) or x.shape[-1] > norm.LARGEST:
        return layers.project(x, normed, *projections)
    weights = (each.weight.to(x.dtype) for each in projections)
    return _Project.apply(x, normed.weight, normed.eps, *weights)  # pyright: ignore[reportReturnType]


@cache
def _warn_of_wide_norms(width: int) -> None:
    logger.warning("norms of width %d take torch: the kernel has at most %d values (docs/gpu.md)", width, norm.LARGEST)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, cos: Tensor, sin: Tensor, adjacent: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.adjacent = adjacent
        return rotary.rotate(x_BSHd.flatten(0, 1), cos, sin, adjacent, False).view(x_BSHd.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_BSHd,) = grads
        turned = rotary.rotate(grad_BSHd.flatten(0, 1), *ctx.saved_tensors, ctx.adjacent, True)
        return turned.view(grad_BSHd.shape), None, None, None


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool) -> Tensor:
        ctx.save_for_backward(x_BSHd, weight, cos, sin)
        ctx.options = (eps, adjacent)
        return normed_rotary(x_BSHd.flatten(0, 1), weight, cos, sin, eps, adjacent).view(x_BSHd.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BSHd, weight, *tables = ctx.saved_tensors
        flat = (grads[0].flatten(0, 1), x_BSHd.flatten(0, 1), weight, *tables)
        dx, sums = normed_rotary_backward(*flat, *ctx.options)
        return dx.view(x_BSHd.shape), sums.sum(0).to(weight.dtype), None, None, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        losses_BS, log_z_BS = cross_entropy(logits_BSV, labels_BS)
        ctx.save_for_backward(logits_BSV, labels_BS, log_z_BS)
        return losses_BS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cross_entropy_backward(*ctx.saved_tensors, grads[0]), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, wide: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return tuple(each.view(x.shape) for each in norm.rms_norm(x.flatten(0, -2), weight, eps, wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad, *wide = (each.flatten(0, -2) for each in grads)
        dx, sums = norm.rms_norm_backward(grad, wide[0] if wide else None, x.flatten(0, -2), weight, ctx.eps)
        return dx.view(x.shape), sums.sum(0).to(weight.dtype), None, None


class _Project(torch.autograd.Function):
    """Multiplies one normed x by several weights. In backward, each product adds its gradient of the normed x to the sum of
    the earlier gradients, so no separate pass adds them. Backward computes the norm again, so autograd keeps only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, norm_weight, *weights)
        ctx.eps = eps
        (h_MD,) = norm.rms_norm(x.flatten(0, -2), norm_weight, eps, False)
        return tuple(F.linear(h_MD.view(x.shape), weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, norm_weight, *weights = ctx.saved_tensors
        flat_ME, x_MD = [each.flatten(0, -2) for each in grads], x.flatten(0, -2)
        grad_MD = flat_ME[0] @ weights[0]
        for grad_ME, weight in zip(flat_ME[1:], weights[1:], strict=True):
            grad_MD.addmm_(grad_ME, weight)
        (h_MD,) = norm.rms_norm(x_MD, norm_weight, ctx.eps, False)
        asked = zip(flat_ME, ctx.needs_input_grad[3:], strict=True)
        grad_weights = [each.T @ h_MD if asks else None for each, asks in asked]
        dx_MD, sums = norm.rms_norm_backward(grad_MD, None, x_MD, norm_weight, ctx.eps)
        return dx_MD.view(x.shape), sums.sum(0).to(norm_weight.dtype), None, *grad_weights


TRITON = DenseKernels(_rotate, _token_losses, _rms_norm, _norm_for_router, _project, _norm_and_rotate)
