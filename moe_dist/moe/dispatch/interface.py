"""What every dispatcher offers: tokens to the ranks of their experts and back, in three calls with records between them.

A dispatcher is one file beside this one, one section in the tagged union `parallel.dispatch`, and one line in build.py.
Shape letters: T tokens on this rank, D hidden size, N pairs (static), R rows here, Q (token, expert) pairs computed here.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from moe_dist.moe.routing import Assignments


@dataclass(frozen=True)
class DispatchedRows:
    """What arrived: rows [R, D], and in slot order each pair's weight [Q]. Both differentiable."""

    rows_RD: Tensor
    weight_Q: Tensor


class PairLayout(Protocol):
    """Which rows each of this rank's experts computes: all that the experts need to know of a dispatch.

    Attributes:
        row_of_pair_Q: int64, the row in [0, R) of each pair computed here; pairs are in slot order.
        slot_counts: Pairs of each of this rank's slots.
    """

    @property
    def row_of_pair_Q(self) -> Tensor: ...  # noqa: N802
    @property
    def slot_counts(self) -> tuple[int, ...]: ...


class DispatchPlan(Protocol):
    """Who goes where, for one layer and micro-batch: without gradient, and kept under recompute.

    Between `dispatch` and `combine` it is a PairLayout as well.

    Attributes:
        num_remote_rows: Rows that leave this rank in forward, as in the ledger.
        num_pairs: Pairs that this rank's tokens take.
        num_remote_pairs: Those whose expert lives on another rank.
    """

    @property
    def num_remote_rows(self) -> int: ...
    @property
    def num_pairs(self) -> int: ...
    @property
    def num_remote_pairs(self) -> int: ...


P = TypeVar("P", bound=DispatchPlan)


class Dispatcher(Protocol[P]):
    """Dispatch and combine over one EP group. Its ranks make the same calls in the same order, whatever their sizes."""

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> P:
        """Decides who goes where. All host syncs of a layer are in here; `layer` names it in records and reports."""
        ...

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: P) -> DispatchedRows:
        """Brings each row, and its pairs' weights, to the experts. Differentiable, the exchange one autograd node."""
        ...

    def combine(self, rows_RD: Tensor, plan: P) -> Tensor:
        """Brings the summed rows [R, D] home: y_TD, zero for tokens without an expert. Differentiable, as one node."""
        ...
