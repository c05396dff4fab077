"""Rows out of a table and sums of rows back into one: fp32 sums in both directions, and no more kept than backward needs.

The indices belong to the dispatch plan, which exists anyway: they are held, not saved as tensors. Shape letters: T rows of
a table, Q (token, expert) pairs, R rows that the pairs belong to, D hidden size.

On CUDA `index_add_` adds atomically: with three or more terms in a row the last bits may differ from run to run.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.routing import accumulation_dtype

SLICE_BYTES = 16 << 20  # of rows that are converted at once: enough work for a kernel, little beside the rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_TD: Tensor, index_Q: Tensor) -> Tensor:
        ctx.index_Q, ctx.num_rows = index_Q, table_TD.shape[0]
        return table_TD.index_select(0, index_Q)  # on the host faster than table[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_QD,) = grads
        return sum_rows(grad_QD, ctx.index_Q, ctx.num_rows).to(grad_QD.dtype), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_QD: Tensor, weight_Q: Tensor, row_Q: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(y_QD, weight_Q)
        ctx.row_Q = row_Q
        return sum_rows(y_QD.to(weight_Q.dtype) * weight_Q[:, None], row_Q, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_RD,) = grads
        y_QD, weight_Q = ctx.saved_tensors
        grad_QD = grad_RD.index_select(0, ctx.row_Q)
        grad_weight_Q = (grad_QD * y_QD.to(grad_QD.dtype)).sum(-1)
        return (grad_QD * weight_Q[:, None]).to(y_QD.dtype), grad_weight_Q, None, None


def gather_rows(table_TD: Tensor, index_Q: Tensor) -> Tensor:
    """table[index], [Q, D]; where a row is taken several times its gradients are summed in fp32 and rounded once."""
    return _Gather.apply(table_TD, index_Q)  # pyright: ignore[reportReturnType]


def weighted_row_sum(y_QD: Tensor, weight_Q: Tensor, row_Q: Tensor, num_rows: int) -> Tensor:
    """Sum of weight * y over the pairs of each row, [R, D] in the weights' dtype. Keeps y (in its dtype) and weights."""
    return _WeightedSum.apply(y_QD, weight_Q, row_Q, num_rows)  # pyright: ignore[reportReturnType]


def sum_rows(rows_QD: Tensor, index_Q: Tensor, num_rows: int) -> Tensor:
    """Sum of the rows of each index, [num_rows, D] in fp32 (float64 for float64 rows). Without gradient."""
    dtype = accumulation_dtype(rows_QD.dtype)
    return add_rows(torch.zeros(num_rows, rows_QD.shape[1], dtype=dtype, device=rows_QD.device), index_Q, rows_QD)


def add_rows(sum_TD: Tensor, index_Q: Tensor, rows_QD: Tensor) -> Tensor:
    """Adds each row to its index's sum, in place, in the sum's dtype. Without gradient.

    Rows of another dtype are converted in slices of `SLICE_BYTES`, in order: the same bits as all at once, without a copy
    of all rows at the sum's width.
    """
    if rows_QD.dtype == sum_TD.dtype:
        return sum_TD.index_add_(0, index_Q, rows_QD)
    length = max(1, SLICE_BYTES // (sum_TD.element_size() * max(1, sum_TD.shape[1])))
    for index, rows in zip(index_Q.split(length), rows_QD.split(length), strict=True):
        sum_TD.index_add_(0, index, rows.to(sum_TD.dtype))
    return sum_TD
