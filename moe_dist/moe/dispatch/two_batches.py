"""Exchanges rows of one half of a micro-batch while the other half computes, in forward and backward.

`steps` is a generator. It yields when an exchange has been issued and all further computation of the half needs the
exchanged rows. The caller then runs the other half of the micro-batch up to that half's next exchange
(`moe_dist.model.two_batches`). `pipelined` explains the autograd nodes and their chain, which here passes through the nodes
of both halves. The following table shows the order for the halves A and B. Each line is computed while the exchange of the
previous line is in flight:

    forward     A  attention, router                    StartDispatch
                B  attention, router                    StartDispatch
                A  EndDispatch, experts                 StartCombine
                B  EndDispatch, experts                 StartCombine
                A  EndCombine, next layer's attention   StartDispatch
    backward    the steps in reverse order: End issues the gradients, Start waits for them

The memory is that of `all_to_all`: the R and S rows of both halves add up to those of the whole micro-batch.
"""

from collections.abc import Generator
from typing import Any

from torch import Tensor

from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.interface import DispatchedRows, RunExperts, RunShared
from moe_dist.moe.dispatch.pipelined import EndCombine, EndDispatch, Flight, StartCombine, StartDispatch


class Chain:
    """An empty tensor that passes through the autograd nodes of both halves. `end` is the last node's output."""

    def __init__(self, like: Tensor) -> None:
        self.end: Any = like.new_empty(0)


class TwoBatchDispatcher(AllToAllDispatcher):
    """Dispatches like `AllToAllDispatcher`. `run` dispatches a whole micro-batch, for example in evaluation. `steps`
    dispatches one half of a micro-batch."""

    def steps(
        self,
        h_TD: Tensor,
        weight_N: Tensor,
        plan: AllToAllPlan,
        chain: Chain,
        *,
        experts: RunExperts,
        shared: RunShared = None,
    ) -> Generator[None, None, tuple[Tensor, Tensor | None]]:
        """Like `Dispatcher.run`, but yields twice: while the rows of dispatch and while the rows of combine are in
        flight."""
        flight, mark = Flight(plan, self.exchange, repeated=False), self.exchange.all_to_all.comm_stats.mark
        chain.end = StartDispatch.apply(chain.end, h_TD, weight_N, flight)
        shared_TD = None if shared is None else shared(h_TD)
        yield
        chain.end, rows_RD, weight_Q = EndDispatch.apply(chain.end, flight)  # pyright: ignore[reportGeneralTypeIssues]
        out_RD = experts(DispatchedRows(mark("pairs", rows_RD), weight_Q, plan.row_items), plan)
        chain.end = StartCombine.apply(chain.end, out_RD, flight)
        yield
        chain.end, y_TD = EndCombine.apply(chain.end, None, flight, h_TD)  # pyright: ignore[reportGeneralTypeIssues]
        return y_TD, shared_TD
