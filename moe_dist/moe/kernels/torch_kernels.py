"""The arithmetic on rows by operations of torch. `interface.py` documents the methods and the shape letters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.dispatch.rows import accumulation_dtype, add_rows, gather_rows, weighted_row_sum
from moe_dist.moe.kernels.interface import Choice, RowIndex, TopK


class TorchKernels:
    """Weights are applied by `sum_pairs`. The choice of experts is `moe_dist.moe.routers.top_k`."""

    has_choose = False

    def choose(self, logits_TC: Tensor, group_T: Tensor, top_k: TopK, choice_TK: Tensor | None) -> Choice:
        raise AssertionError("the router chooses by operations of torch")

    def gather(self, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        x_QD = gather_rows(rows_RD, index.parts[0])
        return x_QD, x_QD

    def swiglu(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor) -> Tensor:
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
            sum_MD = base_MD.to(dtype, copy=True)  # copied, because the caller keeps its tensor
        add_rows(sum_MD, row_O, own_OD)  # while remote rows are in flight
        return add_rows(sum_MD, row_S, wait()).to(own_OD.dtype)


TORCH = TorchKernels()
