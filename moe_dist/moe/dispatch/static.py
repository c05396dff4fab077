"""Sends the same rows as `all_to_all`, but in exchanges of fixed sizes. The host reads no sizes, so a layer has no host
sync, and a CUDA graph can capture the layer.

A rank sends a fixed number of rows and of (token, expert) pairs to each other rank, and computes a fixed number of pairs of
each expert group. These numbers are called the room. Padding fills unused places. It is sent and received, but belongs to
no token and no expert. The device counts rows and pairs that exceed the room as overflow. Overflow ends the run: the
training step raises an error before it changes a weight, and a forward without gradient asserts on the device.

Padding needs no masks, because each list has one extra entry for padding. A padding row is a copy of the table's row T,
which is all zeros and belongs to no token. A padding pair has the weight at index N, which is 0. For a padding pair, the
expert's input is row T. Outputs of padding may be uninitialised, even NaN, but reach no token's output and no gradient.

The own rows are all rows of the table. The number of tokens may differ between ranks, but the room must be the same on all
ranks.

Shape letters: T tokens on this rank, D hidden size, M = T + 1 rows of the table, N (token, expert) pairs (absent pairs
included), W ranks, G expert groups, X slots (experts) of this rank, H ranks (the own rank, then the other ranks in order),
S rows for other ranks, O = M own rows, R = O + received rows, J pairs to send and own pairs (padding included), A pairs
that arrive (own, then received), Q pairs computed here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import Exchange
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.moe.dispatch.static_planning import StaticPlan, StaticPlanner, StaticRoom
from moe_dist.moe.routing.types import Assignments


class StaticDispatcher(TwoStepDispatcher[StaticPlan]):
    """Dispatches and combines tokens over one EP group in exchanges of fixed sizes. `room` is a `StaticRoom`, equal on all
    ranks, or the argument `factor` of `StaticRoom.expected`."""

    def __init__(self, context: DispatchContext, *, room: float | StaticRoom) -> None:
        if not isinstance(room, StaticRoom):
            room = StaticRoom.expected(context.placement, context.tokens, room)
        self.planner = StaticPlanner(context.placement, context.all_to_all, room)
        self.exchange = Exchange(context.all_to_all, kernels=context.kernels)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> StaticPlan:
        plan = self.planner.static_plan(assignments, num_tokens, layer)
        if not torch.is_grad_enabled():  # evaluation reads no counts. The assertion does not sync
            torch._assert_async(plan.sent_5[-1] == 0, OVERFLOW)  # pyright: ignore[reportPrivateImportUsage]
        return plan

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: StaticPlan) -> DispatchedRows:
        table_MD, weight_N = F.pad(h_TD, (0, 0, 0, 1)), F.pad(weight_N, (0, 1))  # the row and the weight of padding
        rows_RD, weight_A = self.exchange.dispatch(table_MD, weight_N, plan)
        return DispatchedRows(rows_RD, F.pad(weight_A, (0, 1)).index_select(0, plan.arrival_Q))

    def combine(self, rows_RD: Tensor, plan: StaticPlan) -> Tensor:
        return self.exchange.combine(rows_RD, plan)[:-1].clone()  # FSDP2 warns of a layer that returns a view


OVERFLOW = (
    "parallel.dispatch.kind=static: more rows or pairs than there is room for; raise parallel.dispatch.room, or set "
    "parallel.dispatch.kind=all_to_all"
)
