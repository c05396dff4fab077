"""Two hops: one row for each distinct (token, other node) between nodes, then one for each (token, rank) inside the node.

Dispatch sends a row to the rank of its destination node that has the sender's position there, and from that rank to the
experts' ranks. Combine sends each rank's weighted sum back to the forwarding rank, which sums over the ranks of its node,
and from there one row for each row that crossed back to its token. Sums are fp32, rounded to the rows' dtype once by the
experts' rank, once by the forwarding rank and once by the token's rank: one rounding more than with `all_to_all`.

Shape letters: T tokens on this rank, D hidden size, N pairs (static), M rows of the middle table (rows of own tokens with
experts in this node, then rows that crossed), A pairs of the middle table, R rows here, Q pairs computed here. G nodes of L
ranks each: EP position = node * L + local.

Collectives of one forward: counts and expert ids on either hop (in `plan`, not repeated by recompute), then weights and
rows between nodes, weights and rows inside the node (`dispatch`), rows inside the node, rows between nodes (`combine`); of
one backward the reverse. Every rank issues all of them, in this order, whatever its sizes.

Host syncs: one a layer, in `plan`, for the sizes of both hops (`hierarchical_planning`).

Memory in rows of D, with S1 rows sent between nodes and S2 inside the node: forward max(R + M + S2, R + M + S1 + T),
backward max(R + M + S2, M + S1 + T). Below fp32 a sum of M (with S2) or T (with S1) rows of 4 bytes an element stands
beside them. Nothing is kept for backward but the plan.
"""

from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.exchange import Exchange
from moe_dist.moe.dispatch.hierarchical_planning import HierarchicalPlan, NodePlanner
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.moe.routing import Assignments
from moe_dist.placement.placement import ExpertPlacement


class HierarchicalDispatcher(TwoStepDispatcher[HierarchicalPlan]):
    """Dispatch and combine over one EP group of several nodes.

    Args:
        placement: Which expert lives on which EP position.
        inter: All-to-all over the ranks with this rank's position in each node, in the order of nodes.
        intra: All-to-all over the ranks of this node.
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
        # Buffers that two hops of different sizes kept would stand beside the rows of the other hop.
        self.inter, self.intra = Exchange(inter, keep_buffers=False), Exchange(intra, keep_buffers=False)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> HierarchicalPlan:
        """Decides both hops from the assignments. Four metadata collectives and the layer's one host sync.

        Raises:
            ResourceError: more rows would arrive in a hop than `max_receive_rows`; nothing has been allocated yet.
        """
        return self.planner.plan(assignments, num_tokens, layer)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: HierarchicalPlan) -> DispatchedRows:
        """As `TwoStepDispatcher`, one exchange a hop."""
        return DispatchedRows(*self.intra.dispatch(*self.inter.dispatch(h_TD, weight_N, plan.inter), plan.intra))

    def combine(self, rows_RD: Tensor, plan: HierarchicalPlan) -> Tensor:
        """As `TwoStepDispatcher`, one exchange a hop."""
        return self.inter.combine(self.intra.combine(rows_RD, plan.intra), plan.inter)
