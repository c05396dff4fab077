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

import numpy as np
import torch

from moe_dist.comm.collectives import from_host
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import AllToAllPlan, Exchange, ExchangeDispatcher
from moe_dist.moe.dispatch.planning import Counts, DispatchPlanner, OwnPairs, starts_of
from moe_dist.moe.kernels.plan import plan_arrive, plan_collect, plan_count, plan_place, plan_scan
from moe_dist.moe.routing.types import Assignments


class CountingPlanner(DispatchPlanner):
    """Plans by counting if there is one chunk and pairs are sorted by token (`Assignments.num_choices`): Triton kernels
    (`kernels/plan.py`) replace about 40 torch operations. Otherwise plans like `DispatchPlanner`, which makes the same
    plans, and whose file explains the shape letters."""

    def plan(self, assignments: Assignments, num_tokens: int, layer: str) -> tuple[tuple[AllToAllPlan, ...], OwnPairs]:
        if assignments.num_choices is None or self.chunks > 1 or self.own_apart:
            return super().plan(assignments, num_tokens, layer)
        tables, size = self._tables_on(assignments.expert_N.device), self.wire.size
        experts = (assignments.expert_N.view(num_tokens, assignments.num_choices), tables.place_E, tables.bin_E)
        starts, totals, message = plan_scan(plan_count(*experts, size), tables.message_M)
        pair_N, index_N, token_N, order_N, first_T = plan_place(*experts, starts, totals, size)  # before the host sync
        counts = self._exchange_counts(message, layer)  # the layer's host sync
        (sizes,), num_remote = counts.sizes, counts.num_remote_pairs
        pair_P = pair_N[: num_remote + sizes.own_pairs]
        arriving = self._start_indices(index_N[:num_remote], counts, layer)
        runs, longest, num_rows = self._arrivals(counts)
        own_index = index_N[num_remote : pair_P.shape[0]]
        received = (own_index, arriving.wait(), from_host(runs, torch.int64, pair_P.device), size, longest)
        order_Q, row_Q = plan_arrive(*received)
        num_sent = sum(sizes.rows.send)
        plan = AllToAllPlan(
            layer=layer,
            prefix="",
            suffix="",
            table_rows=num_tokens,
            rows=sizes.rows,
            pairs=sizes.pairs,
            pair_P=pair_P,
            row_S=token_N[:num_sent],
            row_O=token_N[num_sent : num_sent + sizes.own_rows],
            order_Q=order_Q,
            row_of_pair_Q=row_Q,
            slot_counts=counts.slot_counts[0],
            table_items=(order_N[: num_sent + sizes.own_rows], first_T),
            row_items=plan_collect(*received, int(num_rows.sum()), int(num_rows.max())),
        )
        return (plan,), OwnPairs(pair_P[:0], token_N[:0], ())

    def _arrivals(self, counts: Counts) -> tuple[np.ndarray, int, np.ndarray]:
        """Returns `runs` and `longest` of `plan_arrive`, and each source rank's number of rows, this rank first."""
        own = self.wire.rank
        arriving_HX = counts.arriving_WCX[[own, *(rank for rank in self._ranks if rank != own)], 0]
        row_H, pairs_HX = arriving_HX[:, 0], arriving_HX[:, 1:]
        length_X, first_HX = pairs_HX.T.reshape(-1), starts_of(pairs_HX.reshape(-1)).reshape(pairs_HX.shape)
        of_runs = [length_X, starts_of(length_X), first_HX.T.reshape(-1)]
        runs = np.concatenate([*of_runs, row_H, starts_of(row_H), starts_of(pairs_HX.sum(1)), [length_X.sum()]])
        return runs, int(length_X.max(initial=0)), row_H


class AllToAllDispatcher(ExchangeDispatcher[AllToAllPlan]):
    """Dispatches and combines tokens over one EP group. On a single rank the same code runs without a process group."""

    def __init__(self, context: DispatchContext) -> None:
        kind = DispatchPlanner
        if context.kernels.has_plan:
            from moe_dist.moe.dispatch.all_to_all import CountingPlanner  # imports Triton, which a CPU may lack

            kind = CountingPlanner
        self.planner = kind(context.placement, context.all_to_all, max_receive_rows=context.max_receive_rows)
        self.exchange = Exchange(context.all_to_all, kernels=context.kernels)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> AllToAllPlan:
        """Makes the plan by two metadata collectives and the layer's only host sync. Raises ResourceError, before rows are
        allocated, if more rows than `max_receive_rows` would arrive."""
        (plan,), _ = self.planner.plan(assignments, num_tokens, layer)
        return plan
