"""Gathers rows of a tensor, sums rows with the same index, and sorts pairs. No function of this module syncs with the host.

Sums are fp32 in forward and backward. Autograd saves no index tensor, because the dispatch plan keeps all indices until
backward. Sorting takes time linear in the number of items. Shape letters: T rows of the tensor `table`, Q (token, expert)
pairs, R rows of the pairs, D hidden size, N items.

On CUDA `index_add_` adds atomically, so the last bits of a sum of three or more terms may differ between executions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.kernels.interface import RowIndex

SLICE_BYTES = 16 << 20  # size of a slice of rows that the CPU converts at once; a slice fits into the CPU's cache
CUDA_SLICE_BYTES = 256 << 20  # on CUDA each slice costs two launches, and memory allows large slices


def gate_and_up(gate_QF: Tensor, up_QF: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns gate and up [Q, F], which are the two halves of `gate_QF` if `up_QF` is None."""
    if up_QF is not None:
        return gate_QF, up_QF
    first, second = gate_QF.chunk(2, dim=-1)
    return first, second


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which rows are summed and routing weights computed: float64 for a float64 model, else fp32."""
    return torch.promote_types(dtype, torch.float32)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_TD: Tensor, index_Q: Tensor) -> Tensor:
        ctx.index_Q, ctx.num_rows = index_Q, table_TD.shape[0]  # the plan keeps the index anyway
        return table_TD.index_select(0, index_Q)  # index_select is faster on the host than table[index]

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
        grad_weight_Q = (grad_QD * y_QD.to(grad_QD.dtype)).sum(-1)  # a temporary [Q, D] in the weights' dtype
        return (grad_QD * weight_Q[:, None]).to(y_QD.dtype), grad_weight_Q, None, None


def gather_rows(table_TD: Tensor, index_Q: Tensor) -> Tensor:
    """Returns table[index], [Q, D]. Gradients of a row that is gathered repeatedly are summed in fp32 and rounded once."""
    return _Gather.apply(table_TD, index_Q)  # pyright: ignore[reportReturnType]


def weighted_row_sum(y_QD: Tensor, weight_Q: Tensor, row_Q: Tensor, num_rows: int) -> Tensor:
    """Sums weight * y over the pairs of each row: [R, D] in the weights' dtype. Autograd saves y and the weights."""
    return _WeightedSum.apply(y_QD, weight_Q, row_Q, num_rows)  # pyright: ignore[reportReturnType]


def sum_rows(rows_QD: Tensor, index_Q: Tensor, num_rows: int) -> Tensor:
    """Returns for each index the sum of its rows, [num_rows, D] in fp32 (float64 for float64 rows). Has no gradient."""
    dtype = accumulation_dtype(rows_QD.dtype)
    return add_rows(torch.zeros(num_rows, rows_QD.shape[1], dtype=dtype, device=rows_QD.device), index_Q, rows_QD)


def add_rows(sum_TD: Tensor, index_Q: Tensor, rows_QD: Tensor) -> Tensor:
    """Adds row i of `rows_QD` in place to the row of `sum_TD` at the i-th index, in the dtype of `sum_TD`. Has no gradient.

    Rows of a different dtype are converted in slices of `SLICE_BYTES` (on CUDA `CUDA_SLICE_BYTES`), to avoid a converted
    copy of all rows. Slices are added in order, so they change no bit of the sum.
    """
    if rows_QD.dtype == sum_TD.dtype:
        return sum_TD.index_add_(0, index_Q, rows_QD)
    num_bytes = CUDA_SLICE_BYTES if sum_TD.is_cuda else SLICE_BYTES
    length = max(1, num_bytes // (sum_TD.element_size() * max(1, sum_TD.shape[1])))
    for index, rows in zip(index_Q.split(length), rows_QD.split(length), strict=True):
        sum_TD.index_add_(0, index, rows.to(sum_TD.dtype))
    return sum_TD


def counting_order(key_N: Tensor, num_keys: int) -> Tensor:
    """Returns the permutation (int64) that sorts int64 keys in [0, num_keys) stably. Does not sync.

    The sort is a radix sort with one pass for each byte of the key. On the host numpy sorts, because torch uses a radix
    sort only from 32,768 items on.
    """
    if num_keys > 1 << 15:  # sorts by the low bits, then by the high bits
        low_N = counting_order(key_N & 0x7FFF, 1 << 15)
        return low_N[counting_order((key_N >> 15)[low_N], (num_keys - 1 >> 15) + 1)]
    short_N = key_N.to(torch.uint8 if num_keys <= 1 << 8 else torch.int16)
    return (_host_order if key_N.device.type == "cpu" else _device_order)(short_N)


def _host_order(short_N: Tensor) -> Tensor:
    return torch.from_numpy(np.argsort(short_N.numpy(), kind="stable"))


def _device_order(short_N: Tensor) -> Tensor:
    return torch.sort(short_N, stable=True).indices


def compact(items_N: Tensor, keep_N: Tensor, num_kept: int) -> Tensor:
    """Returns `items[keep]` in order. Does not sync, because the argument `num_kept` gives the length."""
    kept = items_N.new_empty(num_kept + 1)  # all items that are not kept are written into one extra element
    target_N = torch.where(keep_N, keep_N.to(torch.int64).cumsum(0) - 1, num_kept)
    return kept.scatter_(0, target_N, items_N)[:num_kept]


class TorchKernels:
    """`RowKernels` in torch, for any device. `sum_pairs` applies the routing weights. It has no kernels for routers."""

    has_choose = False
    has_plan = False

    def choose(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the router chooses by operations of torch")

    experts_choose = experts_sums = choose

    def gather(self, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        x_QD = gather_rows(rows_RD, index.parts[0])
        return x_QD, x_QD

    def swiglu(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None) -> Tensor:
        gate_QF, up_QF = gate_and_up(gate_QF, up_QF)
        return F.silu(gate_QF) * up_QF

    def sum_pairs(self, y_QD: Tensor, weight_Q: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
        return weighted_row_sum(y_QD, weight_Q, index.parts[0], index.num_rows).to(dtype)

    def sum_rows(
        self, own_OD: Tensor, wait: Callable[[], Tensor], index: RowIndex, base_MD: Tensor | None = None
    ) -> Tensor:
        dtype, (row_O, row_S) = accumulation_dtype(own_OD.dtype), index.parts
        if base_MD is None:  # the fp32 sum takes M x D x 4 bytes in addition to bf16 rows
            sum_MD = own_OD.new_zeros((index.num_rows, own_OD.shape[1]), dtype=dtype)
        else:
            sum_MD = base_MD.to(dtype, copy=True)  # a copy, because the caller keeps its tensor
        add_rows(sum_MD, row_O, own_OD)  # runs while remote rows are in flight
        return add_rows(sum_MD, row_S, wait()).to(own_OD.dtype)


TORCH = TorchKernels()
