"""Two hops: one row for each distinct (token, other node) between nodes, then one for each (token, rank) inside the node.

A row crosses to the rank of its destination node that has the sender's position there, and from that rank to the experts'.
Coming home, each rank's weighted sum goes back to the forwarding rank, which sums over the ranks of its node, and one row
for each row that crossed goes back to its token. Sums are fp32, rounded to the wire's dtype once by the experts' rank, once
by the forwarding rank and once at home: one rounding more than with `per_rank`.

Shape letters: T tokens on this rank, D hidden size, N pairs (static), M rows of the middle table (rows of own tokens with
experts in this node, then rows that crossed), A pairs of the middle table, R rows here, Q pairs computed here. G nodes of L
ranks each: EP position = node * L + local.

Collectives of one forward: counts and expert ids on either hop (in `plan`, not repeated by recompute), then weights and
rows between nodes, weights and rows inside the node (`dispatch`), rows inside the node, rows between nodes (`combine`); of
one backward the reverse. Every rank issues all of them, in this order, whatever its sizes.

Host syncs: one a layer, in `plan`. The sender counts for each node how many rows and pairs each of its ranks will get, so
that the forwarding rank learns the sizes of the second hop from sums of counts on the device, before it has seen an id.

Memory in rows of D, with S1 rows sent between nodes and S2 inside the node: forward max(R + M + S2, R + M + S1 + T),
backward max(R + M + S2, M + S1 + T). Below fp32 a sum of M (with S2) or T (with S1) rows of 4 bytes an element stands
beside them. Nothing is kept for backward but the plan.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import Splits, Wire, split_sizes
from moe_dist.errors import PlacementError
from moe_dist.moe.dispatcher import DispatchedRows
from moe_dist.moe.hop import Hop, combine_hop, dispatch_hop
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

INTER, INTRA = "inter-node", "intra-node"
SPLIT_SIZES = "split sizes of both hops"  # the host sync of a layer, as Traffic records it


@dataclass(frozen=True)
class PerNodePlan:
    """Who goes where, for one layer and micro-batch; all of it without gradient, and kept under recompute.

    Attributes:
        inter, intra: The hop between nodes, whose table is the tokens; the hop inside the node, whose table has M rows.
        pair_N: int64, the taken assignments' indices: pairs for other nodes by (node, token, rank), then those of this
        node. order_A: int64, sorts the middle table's pairs ([own node's, received]) by (rank, row), the own rank last.
        order_Q: int64, sorts the pairs computed here ([own, received]) by slot. row_of_pair_Q: int64, in slot order, the
        row of each pair in [own rows, received rows]. slot_counts: Pairs of each of this rank's slots. num_own_pairs: Pairs
        of this rank's tokens with experts on this rank.
    """

    inter: Hop
    intra: Hop
    pair_N: Tensor
    order_A: Tensor
    order_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]
    num_own_pairs: int

    @property
    def num_remote_rows(self) -> int:
        """Rows that leave this rank in forward, over both hops: forwarded rows of other ranks' tokens count here."""
        return sum(self.inter.rows.send) + sum(self.intra.rows.send)

    @property
    def num_pairs(self) -> int:
        return self.pair_N.shape[0]

    @property
    def num_remote_pairs(self) -> int:
        return self.num_pairs - self.num_own_pairs


@dataclass(frozen=True)
class _Tables:
    """The placement as tensors. A node slot is a slot's number within its node: the ranks' slots one after another.

    Attributes:
        rank_E, node_slot_E: EP position and node slot of each expert.
        row_bin_W, node_bin_G: In the count vector, the place of each rank's and each node's number of rows.
        pair_bin_E: The place of each expert's number of pairs.
        local_X, slot_X: Of each node slot of the own node, its rank's position in the node and its slot on that rank.
    """

    rank_E: Tensor
    node_slot_E: Tensor
    row_bin_W: Tensor
    node_bin_G: Tensor
    pair_bin_E: Tensor
    local_X: Tensor
    slot_X: Tensor


@dataclass(frozen=True)
class _Sizes:
    """All sizes of a layer, as the host reads them.

    Attributes:
        inter_sent_G, inter_received_G: Rows and pairs to and from each node; the own entry is what stays.
        intra_sent_L, intra_received_L: Rows and pairs to and from each rank of the node; the own entry is what stays.
        slot_counts: Pairs of each of this rank's slots.
        own_pairs: Pairs of this rank's tokens with experts on this rank.
    """

    inter_sent_G: list[tuple[int, int]]
    inter_received_G: list[tuple[int, int]]
    intra_sent_L: list[tuple[int, int]]
    intra_received_L: list[tuple[int, int]]
    slot_counts: tuple[int, ...]
    own_pairs: int


class PerNodeDispatcher:
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
        inter: Wire,
        intra: Wire,
        *,
        ranks_per_node: int,
        max_receive_rows: int | None = None,
    ) -> None:
        self.placement = placement
        self.inter = inter
        self.intra = intra
        self.max_receive_rows = max_receive_rows
        # For each node the slots of its ranks, and the length of its counts: rows to the node, then rows and pairs by slot
        # for each rank.
        self._slots_GL = [
            [len(slots) for slots in placement.slots[first : first + ranks_per_node]]
            for first in range(0, placement.num_ranks, ranks_per_node)
        ]
        self._lengths_G = [1 + sum(1 + slots for slots in ranks) for ranks in self._slots_GL]
        self._tables: dict[torch.device, _Tables] = {}

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> PerNodePlan:
        """Decides both hops from the assignments. Four metadata collectives and the layer's one host sync.

        Raises:
            PlacementError: more rows would arrive in a hop than `max_receive_rows`; nothing has been allocated yet.
        """
        num_nodes, per_node, node = self.inter.size, self.intra.size, self.inter.rank
        if [len(ranks) for ranks in self._slots_GL] != [per_node] * num_nodes:
            raise AssertionError(
                f"the wires join {num_nodes} nodes of {per_node} ranks, the placement has {len(self._slots_GL)} nodes"
            )
        tables = self._tables_on(assignments.expert_N.device)
        taken_N = assignments.expert_N != ABSENT
        expert_N = assignments.expert_N.clamp_min(0)
        rank_N = tables.rank_E[expert_N]
        # Sort key: other nodes in order, then this node, then what is absent; inside a node by token, then by rank, so that
        # the pairs of one row are neighbours on either hop.
        place_N = torch.where(rank_N // per_node == node, num_nodes, rank_N // per_node)
        place_N = torch.where(taken_N, place_N, num_nodes + 1)
        key_N = (place_N * num_tokens + assignments.token_N) * per_node + rank_N % per_node
        key_N, pair_N = torch.sort(key_N, stable=True)
        first_row_N, first_leg_N = _changes(key_N // per_node), _changes(key_N)

        counts = self._count(tables, expert_N[pair_N], taken_N[pair_N], first_row_N, first_leg_N)
        sizes = self._exchange_counts(counts, layer)  # the host sync
        num_out, num_own = sum(p for _, p in _others(sizes.inter_sent_G, node)), sizes.inter_sent_G[node][1]
        pair_N, first_row_N = pair_N[: num_out + num_own], first_row_N[: num_out + num_own]
        token_of_row = _compact(assignments.token_N[pair_N], first_row_N, sum(rows for rows, _ in sizes.inter_sent_G))
        inter = _hop(INTER, layer, num_tokens, token_of_row, sizes.inter_sent_G, sizes.inter_received_G, node)
        code_N = tables.node_slot_E[expert_N[pair_N]] * 2 + first_row_N  # node slot and "a new row begins here"
        arrived = self.inter.exchange(
            code_N[:num_out].to(torch.int32), inter.pairs, name=inter.call("expert ids"), layer=layer
        )
        code_A = torch.cat([code_N[num_out:], arrived.to(torch.int64)])
        return self._plan_inside(tables, inter, code_A, pair_N, sizes)

    def _plan_inside(self, tables: _Tables, inter: Hop, code_A: Tensor, pair_N: Tensor, sizes: _Sizes) -> PerNodePlan:
        """The hop inside the node, from the pairs of the middle table (own node's, then received), in the order of rows."""
        local, layer = self.intra.rank, inter.layer
        row_A, node_slot_A = (code_A % 2).cumsum(0) - 1, code_A // 2
        place_A = tables.local_X[node_slot_A]
        place_A = torch.where(place_A == local, self.intra.size, place_A)
        place_A, order_A = torch.sort(place_A, stable=True)
        row_A, slot_A = row_A[order_A], tables.slot_X[node_slot_A[order_A]]
        num_rows = inter.row_O.shape[0] + sum(inter.rows.receive)  # M
        first_A = _changes(place_A * num_rows + row_A)
        row_of_leg = _compact(row_A, first_A, sum(rows for rows, _ in sizes.intra_sent_L))
        intra = _hop(INTRA, layer, num_rows, row_of_leg, sizes.intra_sent_L, sizes.intra_received_L, local)
        num_out = sum(intra.pairs.send)
        code_A = slot_A * 2 + first_A
        arrived = self.intra.exchange(
            code_A[:num_out].to(torch.int32), intra.pairs, name=intra.call("expert ids"), layer=layer
        )
        code_Q = torch.cat([code_A[num_out:], arrived.to(torch.int64)])
        order_Q = torch.argsort(code_Q // 2, stable=True)
        row_Q = (code_Q % 2).cumsum(0) - 1
        return PerNodePlan(
            inter=inter,
            intra=intra,
            pair_N=pair_N,
            order_A=order_A,
            order_Q=order_Q,
            row_of_pair_Q=row_Q[order_Q],
            slot_counts=sizes.slot_counts,
            num_own_pairs=sizes.own_pairs,
        )

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: PerNodePlan) -> DispatchedRows:
        """Brings each row and its pairs' weights to the experts. One autograd node a hop."""
        middle_MD, weight_A = dispatch_hop(h_TD, weight_N[plan.pair_N], self.inter, plan.inter)
        rows_RD, weight_Q = dispatch_hop(middle_MD, weight_A[plan.order_A], self.intra, plan.intra)
        return DispatchedRows(rows_RD=rows_RD, weight_Q=weight_Q[plan.order_Q])

    def combine(self, rows_RD: Tensor, plan: PerNodePlan) -> Tensor:
        """Brings the summed rows [R, D] home: y_TD, zero for tokens without an expert. One autograd node a hop."""
        return combine_hop(combine_hop(rows_RD, self.intra, plan.intra), self.inter, plan.inter)

    def _tables_on(self, device: torch.device) -> _Tables:
        """The placement as tensors, copied to `device` once."""
        if device not in self._tables:
            starts, at = [], 0  # for each node the place of its counts
            for length in self._lengths_G:
                starts.append(at)
                at += length
            row_bins, first_slots = [], []  # for each rank the place of its counts, and its first node slot
            for start, ranks in zip(starts, self._slots_GL, strict=True):
                for local, _ in enumerate(ranks):
                    row_bins.append(start + 1 + sum(1 + slots for slots in ranks[:local]))
                    first_slots.append(sum(ranks[:local]))
            places = list(zip(self.placement.rank_of_expert, self.placement.slot_of_expert, strict=True))
            own = self._slots_GL[self.inter.rank]
            self._tables[device] = _Tables(
                rank_E=_integers(self.placement.rank_of_expert, device),
                node_slot_E=_integers([first_slots[rank] + slot for rank, slot in places], device),
                row_bin_W=_integers(row_bins, device),
                node_bin_G=_integers(starts, device),
                pair_bin_E=_integers([row_bins[rank] + 1 + slot for rank, slot in places], device),
                local_X=_integers([local for local, slots in enumerate(own) for _ in range(slots)], device),
                slot_X=_integers([slot for slots in own for slot in range(slots)], device),
            )
        return self._tables[device]

    def _count(
        self, tables: _Tables, expert_N: Tensor, taken_N: Tensor, first_row_N: Tensor, first_leg_N: Tensor
    ) -> Tensor:
        """For each node its distinct rows, and for each of its ranks distinct rows and pairs by slot; int64, flat."""
        total = sum(self._lengths_G)
        counts = torch.zeros(total + 1, dtype=torch.int64, device=expert_N.device)
        rank_N = tables.rank_E[expert_N]
        for keep_N, bin_N in (
            (first_row_N, tables.node_bin_G[rank_N // self.intra.size]),
            (first_leg_N, tables.row_bin_W[rank_N]),
            (taken_N, tables.pair_bin_E[expert_N]),
        ):
            bin_N = torch.where(keep_N & taken_N, bin_N, total)
            counts.scatter_add_(0, bin_N, torch.ones_like(bin_N))
        return counts[:total]

    def _exchange_counts(self, counts: Tensor, layer: str) -> _Sizes:
        """Counts of both hops. Syncs with the host once: sizes of all that follows are read here."""
        node, local = self.inter.rank, self.intra.rank
        slots = self._slots_GL[node]
        length, ranks = self._lengths_G[node], tuple(1 + each for each in slots)
        received_GX = counts.view(1, -1)
        if self.inter.group is not None:
            splits = Splits(send=tuple(self._lengths_G), receive=(length,) * self.inter.size)
            received_GX = self.inter.exchange(counts, splits, name=f"{INTER} counts", layer=layer).view(-1, length)
        forward_X = received_GX[:, 1:].sum(0)  # what this rank forwards to each rank of its node: rows, and pairs by slot
        arriving = forward_X
        if self.intra.group is not None:
            splits = Splits(send=ranks, receive=(ranks[local],) * self.intra.size)
            arriving = self.intra.exchange(forward_X, splits, name=f"{INTRA} counts", layer=layer)
        parts = [counts, received_GX.reshape(-1), forward_X, arriving]
        flat = self.inter.traffic.to_host(SPLIT_SIZES, torch.cat(parts))
        sent, received, forward, arrived = _cut(flat, [part.numel() for part in parts])
        sent_G = _cut(sent, self._lengths_G)
        arrived_L = _cut(arrived, [ranks[local]] * self.intra.size)
        own_rank = _cut(sent_G[node][1:], ranks)[local]
        sizes = _Sizes(
            inter_sent_G=[_rows_and_pairs(each, self._slots_GL[i]) for i, each in enumerate(sent_G)],
            inter_received_G=[_rows_and_pairs(each, slots) for each in _cut(received, [length] * self.inter.size)],
            intra_sent_L=[(each[0], sum(each[1:])) for each in _cut(forward, ranks)],
            intra_received_L=[(each[0], sum(each[1:])) for each in arrived_L],
            slot_counts=tuple(sum(column) for column in zip(*(each[1:] for each in arrived_L), strict=True)),
            own_pairs=sum(own_rank[1:]),
        )
        self._check_budget(INTER, sum(rows for rows, _ in _others(sizes.inter_received_G, node)))
        self._check_budget(INTRA, sum(rows for rows, _ in _others(sizes.intra_received_L, local)))
        return sizes

    def _check_budget(self, hop: str, rows: int) -> None:
        if self.max_receive_rows is not None and rows > self.max_receive_rows:
            position = self.inter.rank * self.intra.size + self.intra.rank
            raise PlacementError(
                f"EP position {position} would receive {rows} rows in one layer's {hop} hop, more than "
                f"parallel.max_receive_rows={self.max_receive_rows}; raise it if memory allows, lower train.micro_batch, "
                "or raise loss.balance so that tokens spread (docs/routing.md)"
            )


def _hop(
    name: str,
    layer: str,
    table_rows: int,
    row_of_leg: Tensor,
    sent: list[tuple[int, int]],
    received: list[tuple[int, int]],
    own: int,
) -> Hop:
    """A hop from its sizes (rows and pairs to and from each rank) and the table's row of each leg, own legs last."""
    rows = Splits(split_sizes([r for r, _ in sent], own), split_sizes([r for r, _ in received], own))
    pairs = Splits(split_sizes([p for _, p in sent], own), split_sizes([p for _, p in received], own))
    num_out = sum(rows.send)
    return Hop(name, layer, table_rows, rows, pairs, row_S=row_of_leg[:num_out], row_O=row_of_leg[num_out:])


def _changes(key_N: Tensor) -> Tensor:
    """Where a sorted list begins a new value; bool."""
    first_N = torch.ones_like(key_N, dtype=torch.bool)
    first_N[1:] = key_N[1:] != key_N[:-1]
    return first_N


def _compact(items_N: Tensor, keep_N: Tensor, num_kept: int) -> Tensor:
    """`items_N[keep_N]` with the length known beforehand, so that CUDA need not sync to learn it."""
    kept = items_N.new_empty(num_kept + 1)
    target_N = torch.where(keep_N, keep_N.to(torch.int64).cumsum(0) - 1, num_kept)
    return kept.scatter_(0, target_N, items_N)[:num_kept]


def _rows_and_pairs(counts: list[int], slots: list[int]) -> tuple[int, int]:
    """Rows to a node, and pairs to all of its ranks, from that node's counts."""
    ranks = _cut(counts[1:], [1 + each for each in slots])
    return counts[0], sum(sum(each[1:]) for each in ranks)


def _others(entries: list[tuple[int, int]], own: int) -> list[tuple[int, int]]:
    return [entry for i, entry in enumerate(entries) if i != own]


def _cut(values: list[int], lengths: "tuple[int, ...] | list[int]") -> list[list[int]]:
    cut, at = [], 0
    for length in lengths:
        cut.append(values[at : at + length])
        at += length
    return cut


def _integers(values: "tuple[int, ...] | list[int]", device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
