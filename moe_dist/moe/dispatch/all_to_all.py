"""One row for each distinct (token, destination rank), by one all-to-all each way.

A token that takes three experts on one rank is sent once, weighted and summed there (fp32, rounded once to the rows'
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

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.exchange import AllToAllPlan, Exchange, ExchangeDispatcher
from moe_dist.moe.dispatch.planning import Planner
from moe_dist.moe.routing import Assignments
from moe_dist.placement.placement import ExpertPlacement


class AllToAllDispatcher(ExchangeDispatcher[AllToAllPlan]):
    """Dispatch and combine over one EP group; without a group the same code on the identity all-to-all.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's all-to-all; its size must be the placement's number of ranks.
        max_receive_rows: Bound of the receive buffer in rows; None for none. The bound that always holds is
            (ep - 1) x T rows of D: every token of every other rank.
    """

    def __init__(self, placement: ExpertPlacement, wire: AllToAll, *, max_receive_rows: int | None = None) -> None:
        self.planner = Planner(placement, wire, max_receive_rows=max_receive_rows)
        self.exchange = Exchange(wire)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> AllToAllPlan:
        """Decides rows and pairs from the assignments. Two metadata collectives and the layer's one host sync.

        Raises:
            ResourceError: more rows would arrive than `max_receive_rows`; nothing has been allocated yet.
        """
        (plan,), _ = self.planner.plan(assignments, num_tokens, layer)
        return plan
