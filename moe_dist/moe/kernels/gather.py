"""A Triton kernel that gathers rows. It writes each element of the result once, and does no arithmetic.

Shape letters: M rows of the table, N rows of the result, D hidden size.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import block_of, launch, operation


@triton.jit
def gather_rows_kernel(table, index, out, D: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + n).to(tl.int64)
    values = tl.load(table + row * D + column, mask=column < D)
    tl.store(out + n * D + column, values.to(out.dtype.element_ty), mask=column < D)


@operation("gather_rows(Tensor table, Tensor index, ScalarType dtype) -> Tensor")
def gather_rows(table: Tensor, index: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Returns table[index], [N, D] in `dtype`."""
    out, width = table.new_empty((index.shape[0], table.shape[1]), dtype=dtype), table.shape[1]
    yield out
    block = block_of(width)
    launch(gather_rows_kernel, (index.shape[0], triton.cdiv(width, block)), table, index, out, D=width, BLOCK=block)
