"""The interface of a dispatcher. Its method `plan` decides which tokens go to which ranks. Its method `run` sends tokens to
their experts, and sums the experts' outputs.

A dispatcher's constructor gets a `DispatchContext` and the fields of the dispatcher's configuration section
(CONTRIBUTING.md). Shape letters: T tokens on this rank, D hidden size, N (token, expert) pairs, absent pairs included, R
rows on this rank for this rank's experts, Q pairs computed here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from moe_dist.moe.kernels.interface import Items
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import Assignments


@dataclass(frozen=True)
class DispatchedRows:
    """The rows [R, D] for this rank's experts, and the weights [Q] of the pairs, sorted by slot. Both have gradients.
    `items` are the `RowIndex.items_of_rows` of the pairs, or None. With `sorted_pairs`, row i is the input of pair i, so R
    = Q."""

    rows_RD: Tensor
    weight_Q: Tensor
    items: Items | None = None
    sorted_pairs: bool = False


class PairLayout(Protocol):
    """Describes which rows each of this rank's experts computes. Experts read only these attributes of a dispatch plan.

    Attributes:
        row_of_pair_Q: int64, row in [0, R) of each (token, expert) pair computed here, in slot order.
        slot_counts: Number of pairs computed by each of this rank's slots (experts).
    """

    @property
    def row_of_pair_Q(self) -> Tensor: ...  # noqa: N802
    @property
    def slot_counts(self) -> tuple[int, ...]: ...


class DispatchPlan(Protocol):
    """Describes which tokens go to which ranks, in one layer and micro-batch. A plan has no gradient. Recomputation reuses
    the plan of forward. Between `dispatch` and `combine` a plan also has the attributes of `PairLayout`.
    """

    @property
    def sent(self) -> SentCounts | Tensor: ...  # see `LayerReport`


P = TypeVar("P", bound=DispatchPlan)
RunExperts = Callable[[DispatchedRows, PairLayout], Tensor]
RunShared = Callable[[Tensor], Tensor] | None


class Dispatcher(ABC, Generic[P]):
    """Sends tokens through the experts of one EP group. All ranks of the group issue the same collectives in the same
    order. If `takes_known_counts` is true, the dispatcher uses `Assignments.counts_WE`, so routers should set it."""

    takes_known_counts: bool = False

    @abstractmethod
    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> P:
        """Decides which rows go to which ranks. `layer` is the layer's name in statistics and in reports of a hang."""

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
        """Returns y [T, D], each token's sum of the outputs of its routed experts (0 for a token without an expert), and
        the output of the shared expert.

        Args:
            experts: Function that computes, for each dispatched row, the weighted sum [R, D] of its experts' outputs.
            shared: The shared expert, or None. The dispatcher calls the shared expert with the layer's input h.
            repeated: True in the recomputation of a block. It needs the tensors that experts and dispatch save for
                backward, but not the value of y.
        """


class TwoStepDispatcher(Dispatcher[P]):
    """A dispatcher whose rows all arrive before the experts run."""

    @abstractmethod
    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: P) -> DispatchedRows:
        """Sends rows and pair weights to the experts' ranks. Each exchange is one autograd node."""

    @abstractmethod
    def combine(self, rows_RD: Tensor, plan: P) -> Tensor:
        """Sends the experts' weighted sums [R, D] back, and adds up each token's sums in y [T, D]. Each exchange is one
        autograd node."""

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
        shared_TD = None if shared is None else shared(h_TD)
        dispatched = self.dispatch(h_TD, weight_N, plan)
        return self.combine(experts(dispatched, plan), plan), shared_TD  # pyright: ignore[reportArgumentType]
