"""Tokens to the ranks of their experts and back: one row for each distinct (token, destination rank).

A token that takes three experts on one rank is sent once, weighted and summed there (fp32, rounded once to the wire's
dtype), and comes back once. Rows for the own rank never enter a collective. Shape letters: T tokens on this rank,
D hidden size, N pairs (static), S remote rows sent, O rows of the own rank, R = O + rows received, Q pairs computed here.

Collectives of one forward: counts, rows of pairs (both int, in `plan`, not repeated by recompute), pair weights and rows
(one autograd node, in `dispatch`), rows back (`combine`); of one backward: rows, then weight gradients and rows. Every
rank issues all of them, in this order, whatever its sizes.

Host syncs: one a layer, in `plan`, for the split sizes of rows, pairs and experts together.

Memory, with item the size of one element: (R + S + T) x D x item at most, in forward and in backward; S of these rows are a
buffer that the exchanges of all layers share, R live until the experts have gathered their inputs, T are y. Below fp32 the
sum of T x D x 4 bytes stands beside it; rows are added to it in slices (`rows.SLICE_BYTES`, the least that T x D x item
counts for). Nothing is kept for backward but the plan: 8 bytes for each taken pair of this rank's tokens, for each row in S
and O and, twice, for each pair in Q.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.dispatch.plan import AllToAllPlan
from moe_dist.moe.dispatch.planning import Planner
from moe_dist.moe.dispatch.row_exchange import GradientsHome, GradientsOut, Lane, RowsHome, RowsOut
from moe_dist.moe.routing import Assignments
from moe_dist.placement.placement import ExpertPlacement


class AllToAllDispatcher:
    """Dispatch and combine over one EP group; without a group the same code on an identity wire.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's wire; its size must be the placement's number of ranks.
        max_receive_rows: Bound of the receive buffer in rows; None for none. The bound that always holds is
            (ep - 1) x T rows of D: every token of every other rank.
    """

    def __init__(self, placement: ExpertPlacement, wire: AllToAll, *, max_receive_rows: int | None = None) -> None:
        self.planner = Planner(placement, wire, max_receive_rows=max_receive_rows)
        self.lane = Lane(wire)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> AllToAllPlan:
        """Decides rows and pairs from the assignments. Two metadata collectives and the layer's one host sync.

        Raises:
            PlacementError: more rows would arrive than `max_receive_rows`; nothing has been allocated yet.
        """
        (plan,), _ = self.planner.plan(assignments, num_tokens, layer)
        return plan

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: AllToAllPlan) -> DispatchedRows:
        """Brings each row and its pairs' weights to the experts. One autograd node, gather and exchange together."""
        return DispatchedRows(*_Dispatch.apply(h_TD, weight_N, plan, self.lane))  # pyright: ignore[reportCallIssue]

    def combine(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        """Brings the summed rows [R, D] home: y_TD, zero for tokens without an expert. One autograd node."""
        return _Combine.apply(rows_RD, plan, self.lane)  # pyright: ignore[reportReturnType]


class _Dispatch(torch.autograd.Function):
    """Rows and pair weights one way, their gradients the other, always both and always in this order."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_N: Tensor, plan: AllToAllPlan, lane: Lane) -> Any:
        ctx.plan, ctx.lane, ctx.num_assignments = plan, lane, weight_N.shape[0]
        return RowsOut(h_TD, weight_N, plan, lane).land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD, grad_weight_Q = grads
        grad_TD, grad_weight_N = GradientsHome(grad_RD, grad_weight_Q, ctx.plan, ctx.lane).land(ctx.num_assignments)
        return grad_TD, grad_weight_N, None, None


class _Combine(torch.autograd.Function):
    """Rows back to their tokens, summed in fp32. Keeps the plan, saves no tensor: under recompute of a whole block the
    recomputation ends before this exchange, which is therefore not repeated."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, plan: AllToAllPlan, lane: Lane) -> Tensor:
        ctx.plan, ctx.lane = plan, lane
        return RowsHome(rows_RD, plan, lane).land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TD,) = grads
        return GradientsOut(grad_TD, ctx.plan, ctx.lane).land(), None, None
