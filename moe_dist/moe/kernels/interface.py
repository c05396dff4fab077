"""The interface of the arithmetic on rows that surrounds the experts' matrix products.

`torch_kernels.py` implements the interface by torch operations, on any device. This implementation is the reference for the
Triton kernels of `triton_kernels.py`. Shape letters: T tokens, C columns of the router, K choices, G expert groups, N items
with a row each, M rows, R rows for this rank's experts, Q (token, expert) pairs computed here, D hidden size, F hidden
width of experts, O own rows and S received rows of a table.
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
    """Assigns each of N items to one of `num_rows` rows. The concatenation of `parts` has each item's row, int64 [N].
    `items` are the `items_of_rows`, if known. With `in_order`, item i has row i, so nothing must be gathered or summed."""

    parts: tuple[Tensor, ...]
    num_rows: int
    items: Items | None = None
    in_order: bool = False

    @cached_property
    def items_of_rows(self) -> Items:
        """Returns the items sorted by row [N], and the index of each row's first item in this list, int32 [num_rows + 1].

        The sort is stable, so a sum over a row's items always adds them in the same order. Costs a sort unless `items` is
        given, but no host sync.
        """
        if self.items is not None:
            return self.items
        row_N = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        sorted_N, order_N = torch.sort(row_N.to(torch.int32), stable=True)
        rows = torch.arange(self.num_rows + 1, dtype=torch.int32, device=sorted_N.device)
        return order_N, torch.searchsorted(sorted_N, rows, out_int32=True)


@dataclass(frozen=True)
class TopK:
    """Describes how tokens choose router columns. The first `num_true` columns are true experts, all others are null.

    Attributes:
        group_of_column_C: int64, group of each column.
        top_k_G: int64, k of each group, and a last entry of 0 for padding (group -1).
        num_choices: K, the largest k.
        scale: Factor of every weight.
        normalise: The columns over which the softmax of the weights runs: `none` (all), `true_chosen` or `all_chosen`.
    """

    group_of_column_C: Tensor
    top_k_G: Tensor
    num_true: int
    num_choices: int
    scale: float
    normalise: str


class Choice(NamedTuple):
    """The choices of T tokens, and sums over these tokens. `Assignments` (moe/routing/types.py), `RoutingCounts` and
    `AuxSums` (moe/routing/counts.py) explain the fields that have no comment."""

    choice_TK: Tensor  # chosen columns, the best first
    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    counts: Tensor  # int64 [C + G]: choices of each column, then tokens of each group
    prob_C: Tensor
    log_z_squared_G: Tensor
    entropy_G: Tensor


class ExpertsTables(NamedTuple):
    """Describes how experts choose tokens."""

    group_E: Tensor  # int64, group of each expert
    share_E: Tensor  # float64, fraction of its group's tokens that each expert takes
    num_groups: int


class ExpertsSums(NamedTuple):
    """The sums over T tokens in expert choice. `RoutingCounts` and `AuxSums` (moe/routing/counts.py) explain the fields."""

    choices_E: Tensor
    tokens_G: Tensor
    above_E: Tensor
    unrouted_G: Tensor
    prob_E: Tensor
    entropy_G: Tensor


class RowKernels(Protocol):
    """The arithmetic on rows. Either `swiglu` or `sum_pairs` multiplies the output of each pair by the pair's weight.

    All methods except `sum_rows` have gradients. Sums are computed in fp32 (float64 for float64 rows) and rounded once.

    Attributes:
        has_choose: Whether `choose`, `experts_choose` and `experts_sums` exist. If not, routers use torch operations.
        has_plan: True if this implementation also has the kernels that `dispatch/counting_planner.py` needs to plan an
            exchange.
    """

    has_choose: bool
    has_plan: bool

    def choose(self, logits_TC: Tensor, group_T: Tensor, top_k: TopK, choice_TK: Tensor | None) -> Choice:
        """Lets tokens of the groups `group_T` (-1: padding) choose columns, or uses the earlier choice `choice_TK`."""
        ...

    def experts_choose(
        self, logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, add_noise: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lets experts choose among one rank's tokens. Returns the three fields of `ExpertsChoice`."""
        ...

    def experts_sums(
        self, logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, threshold_E: Tensor, taken_TE: Tensor
    ) -> ExpertsSums:
        """Returns the sums over all tokens, without gradient."""
        ...

    def gather(self, rows_RD: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
        """Returns the row of each pair, [Q, D], as two tensors that share memory: the inputs of gate and of up. One pass
        can then sum the gradients of both tensors and of all pairs of a row."""
        ...

    def swiglu(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None) -> Tensor:
        """Returns the hidden values of the pairs, silu(gate) * up, [Q, F] in the dtype of `gate_QF`. If `sum_pairs` applies
        no weights, `swiglu` multiplies each pair's hidden values by the pair's weight. If `up_QF` is None, `gate_QF`
        [Q, 2 F] has gate, then up."""
        ...

    def sum_pairs(self, y_QD: Tensor, weight_Q: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
        """Returns each row's sum of pair outputs, [R, D] in `dtype`; a weighted sum if `swiglu` applies no weights."""
        ...

    def sum_rows(
        self, own_OD: Tensor, wait: Callable[[], Tensor], index: RowIndex, base_MD: Tensor | None = None
    ) -> Tensor:
        """Returns for each table row the sum of its row of `base_MD` (if given), of its own rows and of its received rows,
        added in this order. The result is [M, D] in the dtype of the own rows.

        Args:
            wait: Function that waits for the received rows [S, D] and returns them.
            index: Table row of each own row (first part) and of each received row (second part).
        """
        ...
