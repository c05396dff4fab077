"""The kernels of dense parts in Triton. Shape letters: B sequences, H heads, S positions, d head width, V vocabulary."""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.model import layers
from moe_dist.model.kernels.cross_entropy import cross_entropy, cross_entropy_backward
from moe_dist.model.kernels.interface import DenseKernels
from moe_dist.model.kernels.norm_rotary import LARGEST, norm_rotary, norm_rotary_backward
from moe_dist.model.layers import Projection, RMSNorm, RopePairs

logger = logging.getLogger(__name__)


def _rotate(x_BHSd: Tensor, table: tuple[Tensor, Tensor], pairs: RopePairs = "halves") -> Tensor:
    # The transposes copy nothing. A projection has written x in the memory order [B, S, H, d], which the kernel needs.
    return _rows(x_BHSd.transpose(1, 2), None, 0.0, table, pairs)[0].transpose(1, 2)


def _norm_and_rotate(
    x_BSHd: Tensor, weight: Tensor, eps: float, table: tuple[Tensor, Tensor], pairs: RopePairs
) -> Tensor | None:
    """Returns None if only part of a head rotates, or if all heads together are too wide for the kernel."""
    heads, width = x_BSHd.shape[2:]
    if 2 * table[0].shape[-1] != width or heads * width > LARGEST:
        return None
    return _rows(x_BSHd, weight, eps, table, pairs)[0].transpose(1, 2)


def _rows(
    x_BSHd: Tensor, weight: Tensor | None, eps: float, table: tuple[Tensor, Tensor], pairs: RopePairs
) -> tuple[Tensor, ...]:
    """The table may have the angles of a single sequence, which then apply to all B sequences."""
    batch, length = x_BSHd.shape[:2]
    cos, sin = (each.expand(batch, 1, length, -1).flatten(0, 2) for each in table)
    return _NormRotary.apply(x_BSHd, weight, cos, sin, eps, pairs == "adjacent", False)  # pyright: ignore


def _token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return _TokenLosses.apply(logits_BSV, labels_BS)  # pyright: ignore[reportReturnType]


def _rms_norm(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> Any:
    if not _fits(x.shape[-1]):
        _warn_of_norms(x.shape[-1])
        return layers.norm_for_router(x, weight, eps) if wide else layers.rms_norm(x, weight, eps)
    found: Any = _NormRotary.apply(x.unsqueeze(-2), weight, None, None, eps, False, wide)
    return tuple(each.squeeze(-2) for each in found) if wide else found[0].squeeze(-2)


def _norm_for_router(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float32:
        return (normed := _rms_norm(x, weight, eps)), normed
    return _rms_norm(x, weight, eps, wide=True)


def _project(x: Tensor, normed: RMSNorm, *projections: Projection) -> tuple[Tensor, ...]:
    if any(each.bias is not None for each in projections) or not _fits(x.shape[-1]):
        return layers.project(x, normed, *projections)
    weights = (each.weight.to(x.dtype) for each in projections)
    return _Project.apply(x, normed.weight, normed.eps, *weights)  # pyright: ignore[reportReturnType]


def _fits(width: int) -> bool:
    return width <= LARGEST and width % 2 == 0


@cache
def _warn_of_norms(width: int) -> None:
    logger.warning("norms of width %d take torch: the kernel takes even widths up to %d (docs/gpu.md)", width, LARGEST)


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        adjacent: bool,
        wide: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(None if weight is None else x, weight, cos, sin)
        ctx.options = (eps, adjacent)
        found = norm_rotary(x.flatten(0, -3), weight, cos, sin, eps, adjacent, False, wide)
        return tuple(each.view(x.shape) for each in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, *tables = ctx.saved_tensors
        shape = grads[0].shape
        grad, *wide = (each.flatten(0, -3) for each in grads)
        if weight is None:
            return norm_rotary(grad, None, *tables, *ctx.options, True, False)[0].view(shape), *[None] * 6
        flat = (grad, wide[0] if wide else None, x.flatten(0, -3), weight, *tables)
        dx, sums = norm_rotary_backward(*flat, *ctx.options)
        return dx.view(shape), sums.sum(0).to(weight.dtype), *[None] * 5


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


class _Project(torch.autograd.Function):
    """Multiplies one normed x by several weights. In backward, each product adds its gradient of the normed x to the sum of
    the earlier gradients, so no separate pass adds them. Backward computes the norm again, so autograd keeps only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, norm_weight, *weights)
        ctx.eps = eps
        h_MD = _normed(x.flatten(0, -2), norm_weight, eps)
        return tuple(F.linear(h_MD.view(x.shape), weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, norm_weight, *weights = ctx.saved_tensors
        flat_ME, x_MD = [each.flatten(0, -2) for each in grads], x.flatten(0, -2)
        grad_MD = flat_ME[0] @ weights[0]
        for grad_ME, weight in zip(flat_ME[1:], weights[1:], strict=True):
            grad_MD.addmm_(grad_ME, weight)
        h_MD = _normed(x_MD, norm_weight, ctx.eps)
        asked = zip(flat_ME, ctx.needs_input_grad[3:], strict=True)
        grad_weights = [each.T @ h_MD if asks else None for each, asks in asked]
        rows = (grad_MD[:, None], None, x_MD[:, None], norm_weight, None, None)
        dx_MD, sums = norm_rotary_backward(*rows, ctx.eps, False)
        return dx_MD.view(x.shape), sums.sum(0).to(norm_weight.dtype), None, *grad_weights


def _normed(x_MD: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm_rotary(x_MD[:, None], weight, None, None, eps, False, False, False)[0][:, 0]


TRITON = DenseKernels(_rotate, _token_losses, _rms_norm, _norm_for_router, _project, _norm_and_rotate)
