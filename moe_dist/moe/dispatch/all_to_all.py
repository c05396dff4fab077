"""Sends one row (hidden state) for each distinct (token, destination rank). Dispatch and combine use one all-to-all each.

A token with three experts on one rank is sent to this rank once. The experts' rank sums the weighted outputs of the token's
experts (in fp32, rounded once to the rows' dtype), and sends one row back. Rows that stay on their rank take part in no
collective. Shape letters: T tokens on this rank, D hidden size, N (token, expert) pairs, absent pairs included, S rows sent
to other ranks, O rows that stay, R = O + rows received, Q pairs computed here.

Forward has five collectives. The method `plan` exchanges counts, then the row index of each pair. Recomputation does not
repeat these two exchanges. `dispatch` sends pair weights and rows in one autograd node. `combine` sends rows back. Backward
sends the gradient rows of `combine`, then the gradients of weights and rows of `dispatch`. All ranks issue the same
collectives in the same order, even a rank that has nothing to send.

A layer has one host sync: the method `plan` reads the numbers of rows and of pairs to and from all ranks.

Forward and backward each need at most (R + S + T) x D x item bytes of memory; `item` is the number of bytes per element of
a row. The S rows are a buffer that all layers share. The R rows are freed when the experts have gathered their inputs. The
T rows are the output y. With bf16 or fp16 rows, the fp32 sum needs T x D x 4 bytes more. Rows are converted to fp32 in
slices of `torch_kernels.SLICE_BYTES` (on CUDA `CUDA_SLICE_BYTES`). If a slice has more than T x D x item bytes, its size
replaces T x D x item in this bound. From forward to backward only the plan is kept: 8 bytes for each taken pair of this
rank's tokens, 8 for each of the S and O rows, and 16 for each of the Q pairs. With Triton kernels the plan has 20 bytes for
each of the N pairs, 20 for each of the Q pairs, and 4 for each row that is a sum of other rows. N includes absent pairs,
because the lists are made before their lengths are known.
"""

from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import AllToAllPlan, Exchange, ExchangeDispatcher
from moe_dist.moe.dispatch.planning import DispatchPlanner
from moe_dist.moe.routing.types import Assignments


class AllToAllDispatcher(ExchangeDispatcher[AllToAllPlan]):
    """Dispatches and combines tokens over one EP group. On a single rank the same code runs without a process group."""

    def __init__(self, context: DispatchContext) -> None:
        kind = DispatchPlanner
        if context.kernels.has_plan:
            from moe_dist.moe.dispatch.counting_planner import CountingPlanner  # imports Triton, which a CPU may lack

            kind = CountingPlanner
        self.planner = kind(context.placement, context.all_to_all, max_receive_rows=context.max_receive_rows)
        self.exchange = Exchange(context.all_to_all, kernels=context.kernels)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> AllToAllPlan:
        """Makes the plan by two metadata collectives and the layer's only host sync. Raises ResourceError, before rows are
        allocated, if more rows than `max_receive_rows` would arrive."""
        (plan,), _ = self.planner.plan(assignments, num_tokens, layer)
        return plan
