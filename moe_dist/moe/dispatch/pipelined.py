"""Runs experts while exchanges are in flight, in forward and backward. During an exchange, the experts compute the own rows
of the rank (`overlap`), or another chunk of tokens, or both.

Each exchange has two autograd nodes. In forward, Start issues the exchange and End waits for its result. In backward, End
issues the reverse exchange and Start waits. An empty tensor, called the chain, passes through all nodes in the order of
forward. So backward runs the nodes in exactly the reverse order, and all ranks issue the same collectives in the same
order. The following table shows the order with two chunks; (o) marks steps of `overlap`:

    forward     StartDispatch 0, 1   Gate, own pairs, shared (o)   EndDispatch 0   pairs 0   StartCombine 0
                EndDispatch 1   pairs 1   EndCombine 0   StartCombine 1   EndCombine 1
    backward    the steps in reverse order: End issues the gradients, Start waits for them

The nodes keep the plan, but save no tensor. The recomputation of a block repeats only dispatch, because no saved tensor
depends on the result of combine.

The following table shows the memory as a number of rows of D elements. R' and S' are the numbers of received and sent rows
of the chunks that are in memory at once (at most three chunks). With `overlap`, own rows are not copied, so R counts only
received rows. But the experts' sums for own rows need T more rows:

    overlap     forward     R + S + 2 T
                backward    S + max(R + 2 T, 3 T)
    chunks      forward     S' + max(R' + T, r + 2 T)       r rows of the largest chunk; y is concatenated from its chunks
                backward    S' + max(R' + T, 2 T)
    both        forward     S' + max(R' + 2 T, r + 2 T)
                backward    S' + max(R' + 2 T, 3 T)

With bf16 or fp16 rows and n chunks, the fp32 sum of a chunk adds T / n rows of 4 bytes per element to R' (or R). Shape
letters: T tokens, D hidden size, N assignments, S rows sent, R rows for this rank's experts, Q pairs computed here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import AllToAllPlan, CombineReceive, DispatchSend, Exchange
from moe_dist.moe.dispatch.interface import DispatchedRows, Dispatcher, RunExperts, RunShared
from moe_dist.moe.dispatch.planning import DispatchPlanner, OwnPairs
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import Assignments


@dataclass(frozen=True)
class PipelinedPlan:
    """The plans of all chunks. With `overlap`, `own` has the pairs of this rank's tokens with this rank's experts."""

    chunks: tuple[AllToAllPlan, ...]
    own: OwnPairs

    @property
    def sent(self) -> SentCounts:
        total = SentCounts(*map(sum, zip(*(chunk.sent for chunk in self.chunks), strict=True)))
        return total._replace(pairs=total.pairs + self.own.pair_P.shape[0])


class PipelinedDispatcher(Dispatcher[PipelinedPlan]):
    """Sends the same rows as `AllToAllDispatcher`, and runs the experts on some rows while other rows are in flight.

    Args:
        overlap: If true, own rows and the shared expert are computed while the first remote rows are in flight. In each
            layer the experts then run one time more than without `overlap`, each time on fewer rows.
        chunks: Number of ranges of tokens. Each range is sent while the experts compute the previous range.
    """

    def __init__(self, context: DispatchContext, *, overlap: bool = False, chunks: int = 1) -> None:
        options = {"max_receive_rows": context.max_receive_rows, "chunks": chunks, "own_apart": overlap}
        self.planner = DispatchPlanner(context.placement, context.all_to_all, **options)
        self.exchange = Exchange(context.all_to_all, kernels=context.kernels)
        self.overlap = overlap

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> PipelinedPlan:
        """Makes the plans of all chunks by two metadata collectives and the layer's only host sync. Raises ResourceError if
        more rows than `max_receive_rows` would arrive in all chunks together."""
        return PipelinedPlan(*self.planner.plan(assignments, num_tokens, layer))

    def run(
        self,
        h_TD: Tensor,
        weight_N: Tensor,
        plan: PipelinedPlan,
        *,
        experts: RunExperts,
        shared: RunShared = None,
        repeated: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Dispatcher.run`. Calls `experts` for the own pairs (only with `overlap`), then for each chunk. With
        `repeated`, skips combine and fills y with NaN, so that an accidental use of y is noticed."""
        lengths, mark = self.planner.chunk_lengths(h_TD.shape[0]), self.exchange.all_to_all.comm_stats.mark
        parts, flights = h_TD.split(lengths), [Flight(chunk, self.exchange, repeated) for chunk in plan.chunks]
        # without overlap the shared expert runs before the first exchange is issued
        shared_TD = None if shared is None or self.overlap else shared(h_TD)
        bases: list[Tensor | None] = [None] * len(flights)
        y_parts = []
        chain: Any = StartDispatch.apply(h_TD.new_empty(0), parts[0], weight_N, flights[0])
        for index, flight in enumerate(flights):
            if index + 1 < len(flights):  # the next chunk is in flight while this chunk is computed
                chain = StartDispatch.apply(chain, parts[index + 1], weight_N, flights[index + 1])
            if index == 0 and self.overlap:
                chain, here_TD, here_N = _Gate.apply(chain, h_TD, weight_N)  # pyright: ignore[reportGeneralTypeIssues]
                shared_TD = None if shared is None else shared(mark("shared", here_TD.view_as(here_TD)))
                own = DispatchedRows(mark("own pairs", here_TD.view_as(here_TD)), here_N.index_select(0, plan.own.pair_P))
                bases = list(experts(own, plan.own).split(lengths))
            chain, rows_RD, weight_Q = EndDispatch.apply(chain, flight)  # pyright: ignore[reportGeneralTypeIssues]
            rows = DispatchedRows(mark(f"pairs{flight.plan.suffix}", rows_RD), weight_Q)
            out_RD = experts(rows, flight.plan)
            if index > 0:  # the previous chunk's combine was in flight while this chunk's experts ran
                chain, y_TD = EndCombine.apply(chain, bases.pop(0), flights[index - 1], parts[index - 1])
                y_parts.append(y_TD)
            chain = StartCombine.apply(chain, out_RD, flight)
        chain, y_TD = EndCombine.apply(chain, bases.pop(0), flights[-1], parts[-1])
        return torch.cat([*y_parts, y_TD]) if y_parts else y_TD, shared_TD


class Flight:
    """Passes a chunk's pending exchange from the autograd node that starts the exchange to the node that waits for it."""

    def __init__(self, plan: AllToAllPlan, exchange: Exchange, repeated: bool) -> None:
        self.plan, self.exchange, self.repeated = plan, exchange, repeated
        self._sent: DispatchSend | None = None
        self._returning: CombineReceive | None = None

    def send(self, table_TD: Tensor, weight_N: Tensor | None = None) -> None:
        """Starts to send rows, and pair weights if given, to the experts' ranks."""
        self._sent = DispatchSend(table_TD, self.plan, self.exchange, weight_N=weight_N)

    def sent(self) -> DispatchSend:
        """Returns the exchange that `send` started, and drops this object's reference to it."""
        sent, self._sent = self._sent, None  # so that the rows of the exchange are freed after use
        assert sent is not None
        return sent

    def send_back(self, rows_RD: Tensor, grad_weight_Q: Tensor | None = None) -> None:
        """Starts to send rows, and gradients of pair weights if given, back to the tokens' ranks."""
        self._returning = CombineReceive(rows_RD, self.plan, self.exchange, grad_weight_Q=grad_weight_Q)

    def returning(self) -> CombineReceive:
        """Returns the exchange that `send_back` started, and drops this object's reference to it."""
        returning, self._returning = self._returning, None
        assert returning is not None
        return returning


class StartDispatch(torch.autograd.Function):
    """Forward starts to send rows and pair weights to the experts' ranks. Backward waits for the gradients of both."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, h_TD: Tensor, weight_N: Tensor, flight: Flight) -> Tensor:
        ctx.flight, ctx.num_weights = flight, weight_N.shape[0]
        flight.send(h_TD, weight_N)
        return chain.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        receive = ctx.flight.returning()
        grad_weight_N = receive.wait_weights(ctx.num_weights)
        return grads[0], receive.wait(), grad_weight_N, None


class _Gate(torch.autograd.Function):
    """Returns its arguments. Its backward runs after the backward of everything computed from its outputs. It runs before
    the backward of StartDispatch. So own pairs and shared expert overlap with the exchange in backward, too."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, h_TD: Tensor, weight_N: Tensor) -> Any:
        return chain.new_empty(0), h_TD.view_as(h_TD), weight_N.view_as(weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads


class EndDispatch(torch.autograd.Function):
    """Forward waits for rows [R, D] and pair weights [Q]. Backward starts to send the gradients of both back."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, flight: Flight) -> Any:
        ctx.flight, send = flight, flight.sent()
        weight_Q = send.wait_weights()  # waits for the weights first, because their collective was issued first
        return chain.new_empty(0), send.wait(), weight_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.flight.send_back(*grads[1:])
        return grads[0], None


class StartCombine(torch.autograd.Function):
    """Forward starts to send the experts' weighted sums to the tokens' ranks. Backward waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, rows_RD: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        if not flight.repeated:
            flight.send_back(rows_RD)
        return chain.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], ctx.flight.sent().wait(), None


class EndCombine(torch.autograd.Function):
    """Forward waits for the experts' weighted sums and adds them up in y. Backward starts to send the gradients of y."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, base_TD: Tensor | None, flight: Flight, like_TD: Tensor) -> Any:
        ctx.flight, ctx.has_base = flight, base_TD is not None
        if flight.repeated:
            return chain.new_empty(0), torch.full_like(like_TD, float("nan"))
        return chain.new_empty(0), flight.returning().wait(base_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        chain, grad_TD = grads
        ctx.flight.send(grad_TD)
        return chain, grad_TD if ctx.has_base else None, None, None
