"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates matrices with orthogonalised momentum. AdamW
updates all other parameters.

    m <- mu m + (1 - mu) g;   u = mu m + (1 - mu) g;   W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) NS(u)

NS is a Newton-Schulz iteration, which moves each singular value close to 1. The factor 0.2 sqrt(max(rows, columns)) makes
updates as large as AdamW's, whose learning rate and weight decay can then be used (Liu et al., arXiv 2502.16982, eq. 4).
torch.optim.Muon computes the same updates for single matrices in bf16, but supports neither stacks nor shards.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dist.optim.optimizer import MATRIX_MOMENTS, OptimizerContext, add_moments, local

A, B, C = 3.4445, -4.7750, 2.0315  # an iteration maps a singular value s to A s + B s^3 + C s^5
ITERATIONS = 5
LEAST_NORM = 1e-7  # smallest norm by which a matrix is divided, so that the update of a matrix near zero stays small


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Applies Newton-Schulz iterations to a matrix, or to each matrix of a stack, [..., rows, columns]. Singular values of
    at least 0.002 of the Frobenius norm become values between 0.68 and 1.21. Computes in `dtype`."""
    x = (matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(LEAST_NORM)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # transposed, so that x x^T is the smaller square matrix
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """The Muon optimizer for parameter groups from `split_parameters(..., orthogonal=True)`.

    A matrix that FSDP2 has sharded is gathered: each rank that has a shard computes the update of the whole matrix and
    keeps its own rows. Under DDP each rank computes the updates of all dense matrices. A stack of experts' matrices needs
    no collective if it is sharded only by expert. Every rank must call `step`, with gradients for the same parameters.
    `dtype` is the dtype of the Newton-Schulz iterations; float64 parameters always use float64."""

    orthogonal = True

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        momentum: float,
        dtype: torch.dtype,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        # torch rejects an empty list of groups, but a rank without parameters must still take part in each step. Groups
        # have their own weight decay.
        given = list(groups) or [{"params": []}]
        super().__init__(given, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        every = self.param_groups
        self.param_groups = [group for group in every if "moments" not in group]  # AdamW's
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            for parameter in group["params"] if "moments" in group else ():
                if parameter.grad is not None:
                    add_moments(self, group, parameter)
                    self._update(parameter, lr=group["lr"], weight_decay=group["weight_decay"])
        return loss

    def _update(self, parameter: Tensor, *, lr: float, weight_decay: float) -> None:
        kept = self.state[parameter][MATRIX_MOMENTS[0]]
        weight, gradient, mean = (local(each) for each in (parameter, parameter.grad, kept))
        mean.lerp_(gradient, 1.0 - self.momentum)
        dtype = torch.float64 if weight.dtype == torch.float64 else self.dtype
        direction = _for_whole_matrices(gradient.lerp(mean, self.momentum), parameter, dtype)
        weight.mul_(1.0 - lr * weight_decay)
        weight.add_(direction.to(weight.dtype), alpha=-lr * 0.2 * math.sqrt(max(parameter.shape[-2:])))


def muon(context: OptimizerContext, **fields: Any) -> Muon:
    """Makes the optimizer for `optimizer.kind=muon`."""
    return Muon(context.groups, dtype=context.dtype, **fields)


def _for_whole_matrices(update: Tensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonalises this rank's part of an update. Costs an all-gather if each rank has only a part of the matrix."""
    if not isinstance(parameter, DTensor) or all(
        isinstance(each, Shard) and each.dim == 0 and parameter.ndim == 3 for each in parameter.placements
    ):
        return orthogonalise(update, dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = DTensor.from_local(
        update, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    rows = tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))
    return orthogonalise(whole, dtype)[rows]
