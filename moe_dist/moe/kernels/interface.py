"""The interface of the arithmetic on rows that surrounds the experts' matrix products.

`torch_kernels.py` implements the interface by operations of torch, on any device. `triton_kernels.py` implements the
interface by Triton kernels, whose reference is `torch_kernels.py`. Shape letters: T tokens, C columns of the router, K
choices, G expert groups, N items with a row each, M rows, R rows for this rank's experts, Q (token, expert) pairs computed
here, D hidden size, F hidden width of experts, O own rows and S received rows of a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Items = tuple[Tensor, Tensor]  # see `RowIndex.items_of_rows`


@dataclass(frozen=True)
class RowIndex:
    """Gives each of N items one of `num_rows` rows. `parts` are int64 tensors, whose concatenation has length N. `items`
    are the `items_of_rows`, if known. With `in_order` item i has row i, so no row must be gathered or summed."""

    parts: tuple[Tensor, ...]
    num_rows: int
    items: Items | None = None
    in_order: bool = False

    @cached_property
    def items_of_rows(self) -> Items:
        """Returns the items sorted by row [N], and the place of each row's first item in this order, int32 [num_rows + 1].

        The items of a row keep their order, so a sum over a row's items always adds in the same order. Costs a sort, unless
        the items are known, but no host sync.
        """
        if self.items is not None:
            return self.items
        row_N = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        sorted_N, order_N = torch.sort(row_N.to(torch.int32), stable=True)
        rows = torch.arange(self.num_rows + 1, dtype=torch.int32, device=sorted_N.device)
        return order_N, torch.searchsorted(sorted_N, rows, out_int32=True)


@dataclass(frozen=True)
class TopK:
    """Says how tokens choose columns of the router. The first `num_true` columns are true experts, all others are null.

    Attributes:
        group_of_column_C: int64, group of each column.
        top_k_G: int64, k of each group, then 0 for padding (group -1).
        num_choices: K, the largest k.
        scale: Factor of every weight.
        normalise: Columns over which weights are a softmax: `none` (all), `true_chosen` or `all_chosen`.
    """

    group_of_column_C: Tensor
    top_k_G: Tensor
    num_true: int
    num_choices: int
    scale: float
    normalise: str


class Choice(NamedTuple):
    """Choices of T tokens, and sums over the tokens. Fields without a comment are explained by `Assignments`
    (moe/routing/types.py), `RoutingCounts` and `AuxSums` (moe/routing/counts.py)."""

    choice_TK: Tensor  # chosen columns, the best first
    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    counts: Tensor  # int64 [C + G]: choices of each column, then tokens of each group
    prob_C: Tensor
    log_z_squared_G: Tensor
    entropy_G: Tensor


class ExpertsTables(NamedTuple):
    """Says how experts choose tokens."""

    group_E: Tensor  # int64, group of each expert
    share_E: Tensor  # float64, fraction of its group's tokens that each expert takes
    num_groups: int


class ExpertsSums(NamedTuple):
    """Sums over T tokens in expert choice. `RoutingCounts` and `AuxSums` (moe/routing/counts.py) explain the fields."""

    choices_E: Tensor
    tokens_G: Tensor
    above_E: Tensor
    unrouted_G: Tensor
    prob_E: Tensor
    entropy_G: Tensor


class RowKernels(Protocol):
    """The arithmetic on rows. Either `swiglu` or `sum_pairs` multiplies the output of each pair by the pair's weight.

    All methods but `sum_rows` have gradients. Sums are fp32 (float64 for float64 rows) and rounded once.

    Attributes:
        has_choose: Whether `choose`, `experts_choose` and `experts_sums` exist; otherwise routers choose by torch.
        has_plan: True if this implementation also has kernels that plan an exchange (in `dispatch/counting_planner.py` and
            `dispatch/counting_static_planner.py`).
    """

    has_choose: bool
    has_plan: bool

    def choose(self, logits_TC: Tensor, group_T: Tensor, top_k: TopK, choice_TK: Tensor | None) -> Choice:
        """Lets tokens of the groups `group_T` (-1: padding) choose columns, or uses the earlier choice `choice_TK`."""
        ...

    def experts_choose(
        self, logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, add_noise: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lets experts choose among one rank's tokens: `taken_TE`, `order_TE` and `kth_score_E` of `ExpertsChoice`."""
        ...

    def experts_sums(
        self, logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, threshold_E: Tensor, taken_TE: Tensor
    ) -> ExpertsSums:
        """Returns sums over the tokens, without gradient."""
        ...

    def gather(self, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        """Returns the row of each pair, [Q, D], as two tensors with the same memory, for the products with gate and with
        up. The pass that sums the gradients of a row can then also sum the gradients of the two tensors."""
        ...

    def swiglu(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None) -> Tensor:
        """Returns the hidden values of the pairs, silu(gate) * up, [Q, F] in the dtype of `gate_QF`. Kernels whose
        `sum_pairs` applies no weights multiply each pair's hidden values by the pair's weight in `swiglu`. If `up_QF` is
        None, `gate_QF` has gate and up, gate first: [Q, 2 F]."""
        ...

    def sum_pairs(self, y_QD: Tensor, weight_Q: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
        """Returns the sum of each row's pair outputs, [R, D] in `dtype`, weighted if `swiglu` applied no weights."""
        ...

    def sum_rows(
        self, own_OD: Tensor, wait: Callable[[], Tensor], index: RowIndex, base_MD: Tensor | None = None
    ) -> Tensor:
        """Returns for each table row the sum of `base` (if given), of its own rows, and then of its received rows: [M, D]
        in the dtype of the own rows.

        Args:
            wait: Waits for the received rows, and returns them: [S, D].
            index: Table row of each own row (first part) and of each received row (second part).
        """
        ...
