"""Two Triton kernels. One gathers rows, the other sums rows in fp32 registers.

Each Triton program computes a part of one row of the result. So nothing is added atomically, and a sum reads each input row
once. Shape letters: M rows of a gathered table or of a sum, N gathered rows, D hidden size.
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


@triton.jit(do_not_specialize=["num_own"])  # otherwise Triton compiles a kernel for some values of num_own
def row_sum_kernel(
    own,
    received,
    base,
    order,
    first,
    out,
    num_own,
    D: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        total += tl.load(base + m * D + column, mask=mask).to(tl.float32)
    place = tl.load(first + m)
    end = tl.load(first + m + 1)
    while place < end:
        item = tl.load(order + place).to(tl.int64)
        if BOTH:
            total += tl.load(own + item * D + column, mask=mask).to(tl.float32)
            total += tl.load(received + item * D + column, mask=mask).to(tl.float32)
        elif item < num_own:
            total += tl.load(own + item * D + column, mask=mask).to(tl.float32)
        else:
            total += tl.load(received + (item - num_own) * D + column, mask=mask).to(tl.float32)
        place += 1
    tl.store(out + m * D + column, total.to(out.dtype.element_ty), mask=mask)


@operation(
    "row_sum(Tensor own, Tensor received, Tensor? base, Tensor order, Tensor first, bool both, ScalarType dtype) -> Tensor"
)
def row_sum(
    own: Tensor, received: Tensor, base: Tensor | None, order: Tensor, first: Tensor, both: bool, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Returns `base` (0 if None) plus the sums of rows, [M, D] in `dtype`.

    The items of row m are `order[first[m] : first[m + 1]]`, and are added in this order. Item i is own row i if i is below
    the number O of own rows, else received row i - O. With `both`, item i is both own row i and received row i.
    """
    num_rows, width = first.shape[0] - 1, own.shape[1]
    out = own.new_empty((num_rows, width), dtype=dtype)
    yield out
    block = block_of(width)
    constants = {"D": width, "HAS_BASE": base is not None, "BOTH": both, "BLOCK": block}
    inputs = (own, received, own if base is None else base, order, first)
    launch(row_sum_kernel, (num_rows, triton.cdiv(width, block)), *inputs, out, own.shape[0], **constants)
