"""Sends rows of a table (hidden states [M, D]) to their experts' ranks, and sums the returned rows in an output table.

    DispatchSend      sends rows and pair weights to the experts                   forward of dispatch
                      sends rows alone, the gradients of combine's output          backward of combine
    CombineReceive    sums rows back into the table                                forward of combine
                      sums rows back, and returns gradients of pair weights        backward of dispatch

The constructors of DispatchSend and CombineReceive start the collectives, and their `wait` returns the result. The rows
that stay on this rank are copied while all other rows are in flight. During this time, torch's `kernels` also add these own
rows to the sums. Triton's kernels add all rows at once, later. The hierarchical dispatcher chains two exchanges: the rows
that arrive in the first exchange are the table of the second exchange.

Sums are fp32 (float64 for float64 rows) and rounded once to the rows' dtype, in forward and backward. Shape letters: M rows
of the table, D hidden size, N weights of (token, expert) pairs, P taken (not absent) pairs of this rank's tokens (to other
ranks, then own), S rows sent to other ranks, O own rows (which stay here), R = O + rows received, Q pairs computed here
(own, then received).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll, Pending, RowBuffers, Splits
from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS, DISPATCH_WEIGHTS
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.moe.kernels.interface import Items, RowIndex, RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.routing.counts import SentCounts


@dataclass(frozen=True)
class ExchangePlan:
    """Describes which rows of a table go to which ranks. A plan has no gradient. Recomputation reuses the plan of forward.

    Attributes:
        layer: Name of the layer, for statistics and reports of a hang.
        prefix, suffix: Text before and after the names of the plan's collectives: the hop, and the index of the chunk.
        table_rows: M, the number of rows of the table.
        rows, pairs: Numbers of rows and of pairs to and from each other rank.
        row_S, row_O: int64, table indices of the rows for other ranks (in sending order), and of the own rows.
        pair_P: int64, index of each taken pair among the N weights: pairs for other ranks in sending order, then own pairs.
        order_Q: int64, permutation from the order of arrival (own pairs, then received pairs) to the order in which experts
            use the pairs; None if both orders are equal.
    """

    layer: str
    prefix: str
    suffix: str
    table_rows: int
    rows: Splits
    pairs: Splits
    row_S: Tensor
    row_O: Tensor
    pair_P: Tensor
    order_Q: Tensor | None

    @property
    def num_remote_rows(self) -> int:
        return sum(self.rows.send)

    @property
    def num_remote_pairs(self) -> int:
        return sum(self.pairs.send)

    @property
    def num_own_rows(self) -> int:
        return self.row_O.shape[0]

    @cached_property
    def table_index(self) -> RowIndex:
        """The index that gives the table row of each own row, and of each row that other ranks send back."""
        return RowIndex((self.row_O, self.row_S), self.table_rows)

    @property
    def sent(self) -> SentCounts | Tensor:
        return SentCounts(self.num_remote_rows, self.pair_P.shape[0], self.num_remote_pairs)


@dataclass(frozen=True)
class AllToAllPlan(ExchangePlan):
    """The plan of an exchange that brings rows to the ranks of their experts. `order_Q` sorts pairs by slot.

    Attributes:
        row_of_pair_Q, slot_counts: See `PairLayout`. Rows are numbered from 0: own rows first, then received rows.
        table_items, row_items: `RowIndex.items_of_rows` of `table_index` and of the pairs computed here; None if the
            planner did not compute these items.
    """

    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]
    table_items: Items | None = None
    row_items: Items | None = None

    @cached_property
    def table_index(self) -> RowIndex:
        return RowIndex((self.row_O, self.row_S), self.table_rows, self.table_items)


A = TypeVar("A", bound=AllToAllPlan)


class Exchange:
    """Exchanges rows over one process group. With `keep_buffers`, all layers share the send buffers [S, D]. `kernels` sum
    the returned rows."""

    def __init__(self, all_to_all: AllToAll, *, keep_buffers: bool = True, kernels: RowKernels = TORCH) -> None:
        self.all_to_all, self.kernels = all_to_all, kernels
        self.buffers = RowBuffers(keep=keep_buffers)

    def dispatch(self, table_MD: Tensor, weight_N: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
        """Sends rows of the table, and pair weights. Returns the rows [R, D] and weights [Q] for this rank's experts. The
        call is one autograd node, with two collectives in forward and two in backward."""
        return _Dispatch.apply(table_MD, weight_N, plan, self)  # pyright: ignore[reportReturnType]

    def combine(self, rows_RD: Tensor, plan: ExchangePlan) -> Tensor:
        """Sends rows [R, D] back to their tokens' ranks. Returns for each table row the sum of its returned rows, [M, D].

        The call is one autograd node. It saves no tensor, so the recomputation of a block does not repeat this exchange.
        """
        return _Combine.apply(rows_RD, plan, self)  # pyright: ignore[reportReturnType]

    def start(
        self, items: Tensor, plan: ExchangePlan, name: str, *, out: Tensor | None = None, back: bool = False
    ) -> Pending:
        """Issues one collective of a plan. It sends rows if `out` is given, else weights. `back` reverses the direction."""
        splits = plan.pairs if out is None else plan.rows
        return self.all_to_all.start(
            items,
            splits.reversed() if back else splits,
            name=f"{plan.prefix}{name}{plan.suffix}",
            layer=plan.layer,
            payload=out is not None,
            out=out,
        )


class ExchangeDispatcher(TwoStepDispatcher[A]):
    """A dispatcher with one exchange in dispatch and one in combine. Subclasses set `exchange` and make the plans."""

    exchange: Exchange

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: A) -> DispatchedRows:
        return DispatchedRows(*self.exchange.dispatch(h_TD, weight_N, plan), plan.row_items)

    def combine(self, rows_RD: Tensor, plan: A) -> Tensor:
        return self.exchange.combine(rows_RD, plan)


class DispatchSend:
    """Sends rows of the table to the ranks of their experts. In forward, dispatch also sends the pairs' weights."""

    def __init__(self, table_MD: Tensor, plan: ExchangePlan, exchange: Exchange, *, weight_N: Tensor | None = None) -> None:
        self.plan, self.exchange = plan, exchange
        name = COMBINE_ROWS + BACKWARD
        if weight_N is not None:
            name, weight_P = DISPATCH_ROWS, weight_N.index_select(0, plan.pair_P)
            self.own_weight = weight_P[plan.num_remote_pairs :]
            self.weights = exchange.start(weight_P[: plan.num_remote_pairs], plan, DISPATCH_WEIGHTS)  # before the rows
        own = plan.num_own_rows
        self.send_SD = exchange.buffers.take(plan.num_remote_rows, table_MD)
        torch.index_select(table_MD, 0, plan.row_S, out=self.send_SD)  # the only copy of the rows to be sent
        self.rows_RD = table_MD.new_empty(own + sum(plan.rows.receive), table_MD.shape[1])
        self.rows = exchange.start(self.send_SD, plan, name, out=self.rows_RD[own:])
        torch.index_select(table_MD, 0, plan.row_O, out=self.rows_RD[:own])  # runs while remote rows are in flight

    def wait_weights(self) -> Tensor:
        """Waits for the weights [Q]. Returns them in the order in which the experts use the pairs."""
        weight_Q = torch.cat([self.own_weight, self.weights.wait()])
        return weight_Q if self.plan.order_Q is None else weight_Q.index_select(0, self.plan.order_Q)

    def wait(self) -> Tensor:
        """Waits for the rows [R, D]. Returns own rows, then received rows."""
        self.rows.wait()
        self.exchange.buffers.give(self.send_SD)  # reused only after the collective has read the buffer
        return self.rows_RD


class CombineReceive:
    """Sends rows back to the ranks of their tokens. In backward, dispatch also sends the gradients of pair weights."""

    def __init__(
        self, rows_RD: Tensor, plan: ExchangePlan, exchange: Exchange, *, grad_weight_Q: Tensor | None = None
    ) -> None:
        self.plan, self.exchange, self.rows_RD = plan, exchange, rows_RD
        name = COMBINE_ROWS
        if grad_weight_Q is not None:
            name, num_own = DISPATCH_ROWS + BACKWARD, plan.pair_P.shape[0] - plan.num_remote_pairs
            if plan.order_Q is not None:  # sorts the gradients back to the order of arrival
                grad_weight_Q = torch.empty_like(grad_weight_Q).index_copy_(0, plan.order_Q, grad_weight_Q)
            self.own_weight = grad_weight_Q[:num_own]
            self.weights = exchange.start(grad_weight_Q[num_own:], plan, DISPATCH_WEIGHTS + BACKWARD, back=True)
        self.back_SD = exchange.buffers.take(plan.num_remote_rows, rows_RD)
        self.rows = exchange.start(rows_RD[plan.num_own_rows :], plan, name, out=self.back_SD, back=True)

    def wait_weights(self, num_weights: int) -> Tensor:
        """Waits for the gradients of the pair weights, and returns them [N], with 0 for absent pairs."""
        weight_P = torch.cat([self.weights.wait(), self.own_weight])
        return weight_P.new_zeros(num_weights).index_copy_(0, self.plan.pair_P, weight_P)  # no sum: pairs are unique

    def wait(self, base_MD: Tensor | None = None) -> Tensor:
        """Returns the sums [M, D] of `base_MD` (if given), own rows and returned rows, rounded once to the rows' dtype."""
        own_OD = self.rows_RD[: self.plan.num_own_rows]
        sum_MD = self.exchange.kernels.sum_rows(own_OD, self.rows.wait, self.plan.table_index, base_MD)
        self.exchange.buffers.give(self.back_SD)
        return sum_MD


class _Dispatch(torch.autograd.Function):
    """Forward sends rows and pair weights to the ranks of the experts. Backward sends the gradients of rows and weights
    back. Rows and weights share one autograd node, so that all ranks issue the collectives of backward in the same
    order."""

    @staticmethod
    def forward(ctx: Any, table_MD: Tensor, weight_N: Tensor, plan: ExchangePlan, exchange: Exchange) -> Any:
        ctx.plan, ctx.exchange, ctx.num_weights = plan, exchange, weight_N.shape[0]
        send = DispatchSend(table_MD, plan, exchange, weight_N=weight_N)
        weight_Q = send.wait_weights()
        return send.wait(), weight_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        receive = CombineReceive(grads[0], ctx.plan, ctx.exchange, grad_weight_Q=grads[1])
        grad_weight_N = receive.wait_weights(ctx.num_weights)
        return receive.wait(), grad_weight_N, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, plan: ExchangePlan, exchange: Exchange) -> Tensor:
        ctx.plan, ctx.exchange = plan, exchange
        return CombineReceive(rows_RD, plan, exchange).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return DispatchSend(grads[0], ctx.plan, ctx.exchange).wait(), None, None
