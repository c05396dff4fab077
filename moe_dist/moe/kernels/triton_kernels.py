"""Implements the arithmetic on rows by Triton kernels. `interface.py` documents the methods and the shape letters.

Each sum adds in a fixed order, in fp32 registers. The backward of gathering rows sums rows, and the backward of summing
rows gathers rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.kernels.choose import AMONG, choose, choose_backward
from moe_dist.moe.kernels.expert_choice import choice_candidates, choice_sums, choice_take
from moe_dist.moe.kernels.interface import Choice, ExpertsSums, ExpertsTables, RowIndex, TopK
from moe_dist.moe.kernels.rows import gather_rows, row_sum
from moe_dist.moe.kernels.swiglu import swiglu, swiglu_backward


class TritonKernels:
    """`RowKernels` in Triton. `swiglu` applies the routing weights, so that backward does not read the experts' outputs."""

    has_choose = True
    has_plan = True

    def choose(self, logits_TC: Tensor, group_T: Tensor, top_k: TopK, choice_TK: Tensor | None) -> Choice:
        return Choice(*_Choose.apply(logits_TC, group_T, top_k, choice_TK))  # pyright: ignore[reportGeneralTypeIssues]

    @torch.no_grad()
    def experts_choose(
        self, logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, add_noise: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        masked_TE, counts_BE = choice_candidates(logits_TE, group_T, tables.group_E)
        by_score_TE = torch.sort(masked_TE, dim=0, descending=True, stable=True).indices
        order_TE = by_score_TE
        if add_noise is not None:
            order_TE = torch.sort(add_noise(masked_TE), dim=0, descending=True, stable=True).indices
        candidates_E = counts_BE.sum(0)
        taken_TE, kth_score_E = choice_take(masked_TE, order_TE, by_score_TE, tables.share_E, candidates_E)
        return taken_TE.view(torch.bool), order_TE, kth_score_E

    @torch.no_grad()
    def experts_sums(
        self, logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, threshold_E: Tensor, taken_TE: Tensor
    ) -> ExpertsSums:
        taken_TE, (experts, groups) = taken_TE.view(torch.uint8), (logits_TE.shape[1], tables.num_groups)
        summed = choice_sums(logits_TE, group_T, tables.group_E, threshold_E, taken_TE, groups).sum(0)
        counts, choice, floats = summed.split([experts + groups] * 3)
        # exact, because fp32 represents all integers up to 2^24
        sizes = [experts, groups]
        parts = [each.split(sizes) for each in (counts.to(torch.int64), choice.to(torch.float64), floats)]
        return ExpertsSums(*parts[0], *parts[1], *parts[2])

    def gather(self, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        if index.in_order:
            return rows_RD, rows_RD
        return _Gather.apply(rows_RD, index)  # pyright: ignore[reportReturnType]

    def swiglu(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None) -> Tensor:
        return _SwiGLU.apply(weight_Q, gate_QF, up_QF)  # pyright: ignore[reportReturnType]

    def sum_pairs(self, y_QD: Tensor, weight_Q: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
        if index.in_order:
            return y_QD.to(dtype)
        return _SumPairs.apply(y_QD, index, dtype)  # pyright: ignore[reportReturnType]

    def sum_rows(
        self, own_OD: Tensor, wait: Callable[[], Tensor], index: RowIndex, base_MD: Tensor | None = None
    ) -> Tensor:
        items = index.items_of_rows  # sorts while the other rows are in flight

        # One kernel sums own and received rows after the received rows have arrived. A separate, earlier pass for own rows
        # would write and read M additional rows.
        return row_sum(own_OD, wait(), base_MD, *items, False, own_OD.dtype)


TRITON = TritonKernels()


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TC: Tensor, group_T: Tensor, top_k: TopK, choice_TK: Tensor | None) -> Any:
        among, tables = AMONG[top_k.normalise], (group_T, top_k.group_of_column_C, top_k.top_k_G)
        numbers = (top_k.num_true, top_k.num_choices, top_k.scale, among)
        chosen_TK, token_TK, expert_TK, weight_TK, sums = choose(logits_TC, *tables, choice_TK, *numbers)
        ctx.save_for_backward(logits_TC, *tables, chosen_TK)
        ctx.numbers = (top_k.num_true, top_k.scale, among)
        num_columns, num_groups = logits_TC.shape[1], len(top_k.top_k_G) - 1
        sizes = [num_columns + num_groups, num_columns, num_groups, num_groups]
        counts, prob_C, square_G, entropy_G = sums.sum(0).split(sizes)
        counts = counts.to(torch.int64)  # exact, because fp32 represents all integers up to 2^24
        token_N, expert_N = token_TK.flatten(), expert_TK.flatten()
        ctx.mark_non_differentiable(chosen_TK, token_N, expert_N, counts, entropy_G)
        ctx.set_materialize_grads(False)  # otherwise backward would make zeros for each integer tensor

        # copies, because FSDP2 warns if a module returns views with gradients
        return chosen_TK, token_N, expert_N, weight_TK.flatten(), counts, prob_C.clone(), square_G.clone(), entropy_G

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_TC, group_T, group_of_column_C, top_k_G, chosen_TK = ctx.saved_tensors
        # a gradient is None if no loss uses the weights or the sum
        shapes = ((chosen_TK.numel(),), (logits_TC.shape[1],), (len(top_k_G) - 1,))
        found = zip((grads[3], grads[5], grads[6]), shapes, strict=True)
        given = [logits_TC.new_zeros(shape) if each is None else each for each, shape in found]
        out = choose_backward(logits_TC, group_T, group_of_column_C, top_k_G, chosen_TK, *given, *ctx.numbers)
        return out, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        ctx.index = index  # not save_for_backward, because the plan keeps the index
        ctx.set_materialize_grads(False)  # one joint product for gate and up uses only one output
        x_QD = gather_rows(rows_RD, index.parts[0], rows_RD.dtype)
        return x_QD, x_QD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, *second = [each for each in grads if each is not None]
        inputs = (first, second[0] if second else first[:0], None, *ctx.index.items_of_rows)
        return row_sum(*inputs, bool(second), first.dtype), None


class _SumPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_QD: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
        ctx.index, ctx.dtype = index, y_QD.dtype
        return row_sum(y_QD, y_QD[:0], None, *index.items_of_rows, False, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gather_rows(grads[0], ctx.index.parts[0], ctx.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_Q, gate_QF, up_QF)
        return swiglu(weight_Q, gate_QF, up_QF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        made = swiglu_backward(grads[0], *ctx.saved_tensors)
        return (*made, None) if len(made) == 2 else tuple(made)
