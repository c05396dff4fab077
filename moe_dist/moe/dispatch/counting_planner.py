"""Makes the plans of `all_to_all` for token choice. Triton kernels that count (`kernels/plan.py`) replace about 40 torch
operations. `planning.py` is the reference, makes the same plans, and explains the shape letters.
"""

import numpy as np
import torch

from moe_dist.comm.collectives import from_host
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.planning import Counts, DispatchPlanner, OwnPairs, starts_of
from moe_dist.moe.kernels.plan import plan_arrive, plan_collect, plan_count, plan_place, plan_scan
from moe_dist.moe.routing.types import Assignments


class CountingPlanner(DispatchPlanner):
    """Plans by counting if there is one chunk and pairs are sorted by token (`Assignments.num_choices`). Otherwise plans
    like `DispatchPlanner`."""

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
