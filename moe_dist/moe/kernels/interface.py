"""The interface of the arithmetic on rows that surrounds the experts' matrix products.

`torch_kernels.py` implements it by operations of torch, on any device. It is the reference of `triton_kernels.py`, which
implements it by Triton kernels. Shape letters: N items with a row each, M rows, R rows for this rank's experts, Q (token,
expert) pairs computed here, D hidden size, F hidden width of experts, O own rows and S received rows of a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowIndex:
    """Gives each of N items one of `num_rows` rows. `parts` are int64 tensors, whose concatenation has length N."""

    parts: tuple[Tensor, ...]
    num_rows: int

    @cached_property
    def items_of_rows(self) -> tuple[Tensor, Tensor]:
        """The items sorted by row, int64 [N], and the place of each row's first item in this order, int32 [num_rows + 1].

        The items of a row keep their order, so a sum over them always adds in the same order. Costs a sort but no sync.
        """
        row_N = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        sorted_N, order_N = torch.sort(row_N.to(torch.int32), stable=True)
        rows = torch.arange(self.num_rows + 1, dtype=torch.int32, device=sorted_N.device)
        return order_N, torch.searchsorted(sorted_N, rows, out_int32=True)


class RowKernels(Protocol):
    """`swiglu` and `sum_pairs` together multiply the output of each pair by its weight; which one does so is their choice.

    All methods but `sum_rows` have gradients. Sums are fp32 (float64 for float64 rows) and rounded once.
    """

    def gather(self, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        """Returns the row of each pair [Q, D], for the products with gate and with up: two tensors with the same memory, so
        that their gradients may be summed in the pass that sums the gradients of a row."""
        ...

    def swiglu(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor) -> Tensor:
        """Returns silu(gate) * up in the dtype of `gate`, times the pairs' weights if `sum_pairs` does not apply them."""
        ...

    def sum_pairs(self, y_QD: Tensor, weight_Q: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
        """Returns for each row the sum of its pairs' outputs, [R, D] in `dtype`, weighted if `swiglu` did not do so."""
        ...

    def sum_rows(
        self, own_OD: Tensor, wait: Callable[[], Tensor], index: RowIndex, base_MD: Tensor | None = None
    ) -> Tensor:
        """Returns for each row of a table the sum of `base`, if given, its own rows, and then its received rows: [M, D] in
        the dtype of the own rows.

        Args:
            wait: Waits for the received rows, and returns them: [S, D].
            index: Rows of the table in two parts, those of the own and those of the received rows.
        """
        ...
