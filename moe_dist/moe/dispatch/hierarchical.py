"""Sends rows in two hops. The first hop, between nodes, sends one row for each distinct (token, other node). The second
hop, inside the destination node, sends one row for each distinct (token, rank).

Dispatch sends a row to one rank of the destination node, the forwarding rank. This rank has the same local index in its
node as the sender has in the sender's node. The forwarding rank sends the row on to the ranks of the token's experts. In
combine each rank with experts of the token sends its weighted sum to the forwarding rank. The forwarding rank adds the sums
of its node, and sends one row back to the token's rank. Sums are fp32. The experts' rank, the forwarding rank and the
token's rank each round their sum once to the rows' dtype.

Shape letters: T tokens on this rank, D hidden size, N (token, expert) pairs (absent pairs included), M rows of the middle
table (of the second hop: rows of own tokens with experts in this node, then rows from other nodes), A pairs of these M
rows, R rows for this rank's experts, Q pairs computed here. G nodes of L ranks each: EP position = node * L + local.

In forward the method `plan` exchanges the counts and expert ids of both hops; recomputation does not repeat this.
`dispatch` sends weights and rows between nodes, then inside the node. `combine` sends rows back inside the node, then
between nodes. Backward sends gradients by the collectives of `combine` and `dispatch` in reverse order. Every rank issues
all collectives, even if it has nothing to send.

A layer has one host sync: the method `plan` reads the sizes of both hops together (`hierarchical_planning`).

Let S1 rows be sent between nodes, and S2 rows inside the node. Forward then needs memory for max(R + M + S2, R + M + S1 +
T) rows of D elements, and backward for max(R + M + S2, M + S1 + T) rows. With bf16 or fp16 rows, fp32 sums add M rows of 4
bytes per element to the terms with S2, and T such rows to the terms with S1. From forward to backward only the plan is
kept.
"""

from torch import Tensor

from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import Exchange
from moe_dist.moe.dispatch.hierarchical_planning import HierarchicalPlan, HierarchicalPlanner
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.moe.routing.types import Assignments


class HierarchicalDispatcher(TwoStepDispatcher[HierarchicalPlan]):
    """Dispatches and combines tokens over one EP group of several nodes. A rank receives at most (G - 1) x T rows from
    other nodes, and at most (L - 1) x G x T rows inside the node. The number of EP ranks must be a multiple of L
    (`ranks_per_node`)."""

    def __init__(self, context: DispatchContext, *, ranks_per_node: int) -> None:
        assert context.hops is not None, "the caller makes them"
        most = context.max_receive_rows
        self.planner = HierarchicalPlanner(
            context.placement, *context.hops, ranks_per_node=ranks_per_node, max_receive_rows=most
        )
        # Send buffers are freed after use, so that each hop's buffer takes no memory during the other hop.
        self.inter, self.intra = (Exchange(each, keep_buffers=False, kernels=context.kernels) for each in context.hops)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> HierarchicalPlan:
        """Makes the plan of both hops by four metadata collectives and the layer's only host sync. Raises ResourceError,
        before rows are allocated, if more rows than `max_receive_rows` would arrive in a hop."""
        return self.planner.plan(assignments, num_tokens, layer)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: HierarchicalPlan) -> DispatchedRows:
        return DispatchedRows(*self.intra.dispatch(*self.inter.dispatch(h_TD, weight_N, plan.inter), plan.intra))

    def combine(self, rows_RD: Tensor, plan: HierarchicalPlan) -> Tensor:
        return self.inter.combine(self.intra.combine(rows_RD, plan.intra), plan.inter)
