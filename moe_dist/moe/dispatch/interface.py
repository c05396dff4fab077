"""The dispatcher's interface: it plans who goes where, then brings tokens to their experts' ranks and the results back.

A dispatcher is one file beside this one, one section in the tagged union `parallel.dispatch`, and one line in
build_dispatch.py. Shape letters: T tokens on this rank, D hidden size, N pairs (static), R rows here, Q (token, expert)
pairs computed here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from moe_dist.moe.routing import Assignments


@dataclass(frozen=True)
class DispatchedRows:
    """Rows here [R, D], and in slot order each pair's weight [Q]. Both differentiable."""

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
    """Who goes where, for one layer and micro-batch. Carries no gradient and is kept under recompute.

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
RunExperts = Callable[[DispatchedRows, PairLayout], Tensor]
RunShared = Callable[[Tensor], Tensor] | None


class Dispatcher(ABC, Generic[P]):
    """Tokens through the experts of one EP group. Its ranks make the same calls in the same order, whatever their sizes.

    Attributes:
        takes_known_counts: It uses `Assignments.counts_WE`, so that routers should hand them out.
    """

    takes_known_counts: bool = False

    @abstractmethod
    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> P:
        """Decides who goes where. All host syncs of a layer are in here; `layer` names it in records and reports."""

    @abstractmethod
    def run(
        self,
        h_TD: Tensor,
        weight_N: Tensor,
        plan: P,
        *,
        experts: RunExperts,
        shared: RunShared = None,
        repeated: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """y [T, D] of the routed experts, zero for tokens without one, and the shared expert's output.

        Args:
            experts: From dispatched rows to their weighted sums [R, D].
            shared: The shared expert, called with h.
            repeated: This is a recomputation of a block: y may be anything, since only what experts and dispatch save for
                backward is used.
        """


class TwoStepDispatcher(Dispatcher[P]):
    """A dispatcher whose rows all arrive before the experts run."""

    @abstractmethod
    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: P) -> DispatchedRows:
        """Brings each row, and its pairs' weights, to the experts. Differentiable, each exchange one autograd node."""

    @abstractmethod
    def combine(self, rows_RD: Tensor, plan: P) -> Tensor:
        """Sums the rows [R, D] of all ranks into y [T, D]. Differentiable, each exchange one autograd node."""

    def run(
        self,
        h_TD: Tensor,
        weight_N: Tensor,
        plan: P,
        *,
        experts: RunExperts,
        shared: RunShared = None,
        repeated: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The shared expert, dispatch, experts, combine. Needs a plan that is a PairLayout."""
        shared_TD = None if shared is None else shared(h_TD)
        dispatched = self.dispatch(h_TD, weight_N, plan)
        return self.combine(experts(dispatched, plan), plan), shared_TD  # pyright: ignore[reportArgumentType]
