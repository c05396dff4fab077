"""Makes the plans of `static` for token choice. Triton kernels that count (`kernels/static_plan.py`) replace about 100
torch operations. `static_planning.py` is the reference. It makes the same plans if all rows and pairs fit into the fixed
sizes. If not, only `sent_5` is equal. `static.py` explains the shape letters.
"""

from moe_dist.comm.names import PAIR_ROWS
from moe_dist.moe.dispatch.static_planning import StaticPlan, StaticPlanner
from moe_dist.moe.kernels.plan import plan_collect, plan_count, plan_scan
from moe_dist.moe.kernels.static_plan import static_arrive, static_pad, static_place, static_runs
from moe_dist.moe.routing.types import Assignments


class CountingStaticPlanner(StaticPlanner):
    """Plans by counting if pairs are sorted by token (`Assignments.num_choices`). Otherwise plans like `StaticPlanner`."""

    def static_plan(self, assignments: Assignments, num_tokens: int, layer: str) -> StaticPlan:
        if assignments.num_choices is None:
            return super().static_plan(assignments, num_tokens, layer)
        device, num_pairs = assignments.expert_N.device, assignments.expert_N.shape[0]
        tables, fixed = self._tables_on(device), self._fixed_on(device)
        places = self._places_on(num_tokens, num_pairs, device)
        size, own, room = self.wire.size, self.wire.rank, self.room
        num_sent, num_rows, num_own = sum(self.pairs.send), sum(self.rows.send), num_tokens + 1

        experts = (assignments.expert_N.view(num_tokens, assignments.num_choices), tables.place_E, tables.bin_E)
        starts, totals, message = plan_scan(plan_count(*experts, size), tables.message_M)
        firsts = (fixed.first_bin, fixed.first_pair_W, fixed.first_row_W)
        pair_J, index_J, row_S, *table_items = static_place(*experts, starts, totals, *firsts, num_sent, num_rows)
        most = max(num_pairs, *self.pairs.send, *self.rows.send)
        pairs_W = static_pad(totals, *firsts, pair_J, index_J, row_S, table_items[1], num_pairs, most)
        received = self._exchange(message, layer)
        arrived = self.wire.start(index_J[:num_sent], self.pairs, name=PAIR_ROWS, layer=layer)
        of_runs = (fixed.source_H, fixed.group_X, fixed.computed_G)
        rooms = (num_own, num_pairs, room.rows_W[own], room.pairs_W[own], num_rows)
        runs, counts_X, end_X, sent_5 = static_runs(received, totals, pairs_W, *firsts[1:], *of_runs, *rooms)
        indices = (index_J[num_sent:], arrived.wait(), runs, size)
        arrival_Q, row_Q = static_arrive(*indices, sum(room.computed_WG[own]), num_tokens)
        longest, most_rows = max(num_tokens, room.pairs_W[own]), max(num_own, room.rows_W[own])
        return StaticPlan(
            layer=layer,
            prefix="",
            suffix="",
            table_rows=num_own,
            rows=self.rows,
            pairs=self.pairs,
            row_S=row_S,
            row_O=places.token_O,
            pair_P=pair_J,
            order_Q=None,
            arrival_Q=arrival_Q,
            row_of_pair_Q=row_Q,
            room_G=room.computed_WG[own],
            counts_X=counts_X,
            end_X=end_X,
            sent_5=sent_5,
            table_items=(table_items[0], table_items[1]),
            row_items=plan_collect(*indices, longest, num_own + sum(self.rows.receive), most_rows),
        )
