"""Two hops: one row for each distinct (token, other node) between nodes, then one for each (token, rank) inside the node.

A row crosses to the rank of its destination node that has the sender's position there, and from that rank to the experts'.
Coming home, each rank's weighted sum goes back to the forwarding rank, which sums over the ranks of its node, and one row
for each row that crossed goes back to its token. Sums are fp32, rounded to the wire's dtype once by the experts' rank, once
by the forwarding rank and once at home: one rounding more than with `all_to_all`.

Shape letters: T tokens on this rank, D hidden size, N pairs (static), M rows of the middle table (rows of own tokens with
experts in this node, then rows that crossed), A pairs of the middle table, R rows here, Q pairs computed here. G nodes of L
ranks each: EP position = node * L + local.

Collectives of one forward: counts and expert ids on either hop (in `plan`, not repeated by recompute), then weights and
rows between nodes, weights and rows inside the node (`dispatch`), rows inside the node, rows between nodes (`combine`); of
one backward the reverse. Every rank issues all of them, in this order, whatever its sizes.

Host syncs: one a layer, in `plan`, for the sizes of both hops (`node_planning`).

Memory in rows of D, with S1 rows sent between nodes and S2 inside the node: forward max(R + M + S2, R + M + S1 + T),
backward max(R + M + S2, M + S1 + T). Below fp32 a sum of M (with S2) or T (with S1) rows of 4 bytes an element stands
beside them. Nothing is kept for backward but the plan.
"""

from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.exchange import combine_hop, dispatch_hop
from moe_dist.moe.dispatch.hierarchical_planning import HierarchicalPlan, NodePlanner
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.routing import Assignments
from moe_dist.placement.placement import ExpertPlacement


class HierarchicalDispatcher:
    """Dispatch and combine over one EP group of several nodes.

    Args:
        placement: Which expert lives on which EP position.
        inter: Wire over the ranks with this rank's position in each node, in the order of nodes.
        intra: Wire over the ranks of this node.
        ranks_per_node: L; divides the number of EP positions.
        max_receive_rows: Bound of each hop's receive buffer in rows; None for none. The bounds that always hold are
            (G - 1) x T rows between nodes and (L - 1) x G x T rows inside the node.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        inter: AllToAll,
        intra: AllToAll,
        *,
        ranks_per_node: int,
        max_receive_rows: int | None = None,
    ) -> None:
        self.planner = NodePlanner(
            placement, inter, intra, ranks_per_node=ranks_per_node, max_receive_rows=max_receive_rows
        )
        self.inter = inter
        self.intra = intra

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> HierarchicalPlan:
        """Decides both hops from the assignments. Four metadata collectives and the layer's one host sync.

        Raises:
            PlacementError: more rows would arrive in a hop than `max_receive_rows`; nothing has been allocated yet.
        """
        return self.planner.plan(assignments, num_tokens, layer)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: HierarchicalPlan) -> DispatchedRows:
        """Brings each row and its pairs' weights to the experts. One autograd node a hop."""
        middle_MD, weight_A = dispatch_hop(h_TD, weight_N[plan.pair_N], self.inter, plan.inter)
        rows_RD, weight_Q = dispatch_hop(middle_MD, weight_A[plan.order_A], self.intra, plan.intra)
        return DispatchedRows(rows_RD=rows_RD, weight_Q=weight_Q[plan.order_Q])

    def combine(self, rows_RD: Tensor, plan: HierarchicalPlan) -> Tensor:
        """Brings the summed rows [R, D] home: y_TD, zero for tokens without an expert. One autograd node a hop."""
        return combine_hop(combine_hop(rows_RD, self.intra, plan.intra), self.inter, plan.inter)
