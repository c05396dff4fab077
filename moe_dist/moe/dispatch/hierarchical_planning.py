"""Makes the plans of the hierarchical dispatcher: which rows go to which node, and to which rank inside a node.

(token, expert) pairs are sorted by (node, token), this node last. The pairs of one row (a token sent to a node) are thus
consecutive. In both hops a (token, expert) pair is sent as one number, its code: the expert's slot, and a bit that marks
the first pair of a row. A sender also sends the forwarding rank the numbers of its rows and pairs for each rank of the
node. The forwarding rank sums these counts over all senders on the device. So it has the sizes of the second hop before
expert ids arrive, and one host sync can read the sizes of both hops.

Shape letters are as in `hierarchical.py`, and E experts, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.names import COUNTS, EXPERT_IDS, INTER, INTRA
from moe_dist.moe.dispatch.exchange import AllToAllPlan, ExchangePlan
from moe_dist.moe.dispatch.planning import ExchangeSizes, check_receive_rows
from moe_dist.moe.kernels.torch_kernels import compact, counting_order
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

SPLIT_SIZES = "split sizes of both hops"  # name of the host sync in CommStats


@dataclass(frozen=True)
class HierarchicalPlan:
    """The plans of both hops for one layer and micro-batch. A plan has no gradient, and recomputation reuses it.

    Attributes:
        inter: Exchange between nodes, of rows of this rank's tokens. Pairs are sorted by (node, token), this node last.
        intra: Exchange inside the node, of the M rows of the middle table. Pairs are sorted by (rank, row).
        sent: Counts of this rank. `rows_remote` also counts the rows that this rank forwards for other ranks.
    """

    inter: ExchangePlan
    intra: AllToAllPlan
    sent: SentCounts

    @property
    def row_of_pair_Q(self) -> Tensor:  # noqa: N802
        return self.intra.row_of_pair_Q

    @property
    def slot_counts(self) -> tuple[int, ...]:
        return self.intra.slot_counts


@dataclass(frozen=True)
class _Tables:
    """The placement as tensors. A node slot is a slot of any rank of a node. Node slots are numbered in the order of ranks.

    Attributes:
        rank_E, node_slot_E: EP position of each expert's rank, and each expert's node slot.
        row_bin_W, node_bin_G: Index, in the vector of counts to send, of the number of rows to each rank and node.
        pair_bin_E: Index, in the vector of counts to send, of the number of pairs of each expert.
        local_X, slot_X: For each node slot of this node, the local index of its rank, and its slot on this rank.
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
    """The sizes of one layer's plan, as integers on the host. `slot_counts` has the number of pairs of each slot of this
    rank. `own_pairs` is the number of pairs of this rank's tokens with this rank's experts."""

    inter: ExchangeSizes
    intra: ExchangeSizes
    slot_counts: tuple[int, ...]
    own_pairs: int


class HierarchicalPlanner:
    """Makes the plans of this rank for one EP group of several nodes. `HierarchicalDispatcher` describes the arguments."""

    def __init__(
        self,
        placement: ExpertPlacement,
        inter: AllToAll,
        intra: AllToAll,
        *,
        ranks_per_node: int,
        max_receive_rows: int | None,
    ) -> None:
        self.placement = placement
        self.inter = inter
        self.intra = intra
        self.max_receive_rows = max_receive_rows
        # `_slots_GL`: number of slots of each rank of each node. `_lengths_G`: number of counts that are sent to each node:
        # the number of rows to the node, then for each rank of the node the numbers of rows and of pairs of each slot.
        self._slots_GL = [
            [len(slots) for slots in placement.slots[first : first + ranks_per_node]]
            for first in range(0, placement.num_ranks, ranks_per_node)
        ]
        self._lengths_G = [1 + sum(1 + slots for slots in ranks) for ranks in self._slots_GL]
        self._tables_on = cache(lambda device: _make_tables(placement, self._slots_GL, inter.rank, device))

    def plan(self, assignments: Assignments, num_tokens: int, layer: str) -> HierarchicalPlan:
        """See `HierarchicalDispatcher.plan`."""
        num_nodes, per_node, node = self.inter.size, self.intra.size, self.inter.rank
        if [len(ranks) for ranks in self._slots_GL] != [per_node] * num_nodes:
            raise AssertionError(
                f"the wires join {num_nodes} nodes of {per_node} ranks, the placement has {len(self._slots_GL)} nodes"
            )
        tables = self._tables_on(assignments.expert_N.device)
        sizes = self._exchange_counts(self._count(tables, assignments, num_tokens), layer)  # the layer's host sync

        # sorts pairs by token, then stably by node: other nodes in order, this node, absent pairs
        expert_N, token_N = assignments.expert_N.clamp_min(0), assignments.token_N
        place_N = tables.rank_E[expert_N] // per_node
        place_N = torch.where(place_N == node, num_nodes, place_N)
        place_N = torch.where(assignments.expert_N == ABSENT, num_nodes + 1, place_N)
        by_token_N = counting_order(token_N, num_tokens)  # assignments may be unsorted
        pair_N = by_token_N[counting_order(place_N[by_token_N], num_nodes + 2)]

        num_out = sum(sizes.inter.pairs.send)
        pair_N = pair_N[: num_out + sizes.inter.own_pairs]
        expert_P, token_P = expert_N[pair_N], token_N[pair_N]
        first_P = _changes(place_N[pair_N] * num_tokens + token_P)
        rows, pairs = sizes.inter.rows, sizes.inter.pairs
        token_of_row = compact(token_P, first_P, sum(rows.send) + sizes.inter.own_rows)
        row_S, row_O = token_of_row.tensor_split([sum(rows.send)])
        inter = ExchangePlan(layer, INTER, "", num_tokens, rows, pairs, row_S, row_O, pair_N, order_Q=None)
        code_A = self._exchange_codes(self.inter, pairs, tables.node_slot_E[expert_P], first_P, INTER, layer)
        return self._plan_inside(tables, inter, code_A, sizes)

    def _plan_inside(self, tables: _Tables, inter: ExchangePlan, code_A: Tensor, sizes: _Sizes) -> HierarchicalPlan:
        """Plans the hop inside the node. `code_A` contains the codes of the middle table's pairs, sorted by row."""
        row_A, node_slot_A = (code_A % 2).cumsum(0) - 1, code_A // 2
        place_A = tables.local_X[node_slot_A]
        place_A = torch.where(place_A == self.intra.rank, self.intra.size, place_A)  # own pairs come last, and are not sent
        order_A = counting_order(place_A, self.intra.size + 1)
        row_A, slot_A = row_A[order_A], tables.slot_X[node_slot_A[order_A]]
        num_rows, rows = inter.num_own_rows + sum(inter.rows.receive), sizes.intra.rows  # `num_rows` is M
        first_A = _changes(place_A[order_A] * num_rows + row_A)
        row_S, row_O = compact(row_A, first_A, sum(rows.send) + sizes.intra.own_rows).tensor_split([sum(rows.send)])
        code_Q = self._exchange_codes(self.intra, sizes.intra.pairs, slot_A, first_A, INTRA, inter.layer)
        order_Q = counting_order(code_Q // 2, len(sizes.slot_counts))
        intra = AllToAllPlan(
            layer=inter.layer,
            prefix=INTRA,
            suffix="",
            table_rows=num_rows,
            rows=rows,
            pairs=sizes.intra.pairs,
            row_S=row_S,
            row_O=row_O,
            pair_P=order_A,
            order_Q=order_Q,
            row_of_pair_Q=((code_Q % 2).cumsum(0) - 1)[order_Q],
            slot_counts=sizes.slot_counts,
        )
        pairs = inter.pair_P.shape[0]
        sent = SentCounts(inter.num_remote_rows + intra.num_remote_rows, pairs, pairs - sizes.own_pairs)
        return HierarchicalPlan(inter, intra, sent)

    @staticmethod
    def _exchange_codes(wire: AllToAll, pairs: Splits, slot_P: Tensor, first_P: Tensor, prefix: str, layer: str) -> Tensor:
        """Sends the codes of pairs in one hop. Returns the codes that stay here, then the received codes."""
        code_P, num_out = slot_P * 2 + first_P, sum(pairs.send)
        ids = code_P[:num_out].to(torch.int32)  # int32 instead of int64 halves the bytes
        arrived = wire.exchange(ids, pairs, name=prefix + EXPERT_IDS, layer=layer)
        return torch.cat([code_P[num_out:], arrived.to(torch.int64)])

    def _count(self, tables: _Tables, assignments: Assignments, num_tokens: int) -> Tensor:
        """Counts the rows to each node, and for each rank of the node the rows to the rank and the pairs of each slot.
        Returns int64, 1-D. Uses a bitmap (rank, token) of W x T bytes. Does not sync."""
        total, shape = sum(self._lengths_G), (self.inter.size, self.intra.size, num_tokens)
        taken_N, expert_N = assignments.expert_N != ABSENT, assignments.expert_N.clamp_min(0)
        counts = torch.zeros(total + 1, dtype=torch.int64, device=expert_N.device)  # the last element counts absent pairs
        bin_N = torch.where(taken_N, tables.pair_bin_E[expert_N], total)
        counts.scatter_add_(0, bin_N, torch.ones_like(bin_N))
        cells = self.placement.num_ranks * num_tokens
        cell_N = torch.where(taken_N, tables.rank_E[expert_N] * num_tokens + assignments.token_N, cells)
        present = torch.zeros(cells + 1, dtype=torch.uint8, device=cell_N.device).scatter_(0, cell_N, 1)
        present_GLT = present[:-1].view(shape)
        counts[tables.row_bin_W] = present_GLT.sum(2).flatten()
        counts[tables.node_bin_G] = present_GLT.any(1).sum(1)
        return counts[:total]

    def _exchange_counts(self, counts: Tensor, layer: str) -> _Sizes:
        """Exchanges the counts of both hops, and reads all sizes in the layer's only host sync."""
        node, local, size = self.inter.rank, self.intra.rank, self.intra.size
        slots, length = self._slots_GL[node], self._lengths_G[node]
        ranks = tuple(1 + each for each in slots)
        received_GX = counts.view(1, -1)
        if self.inter.group is not None:
            splits = Splits(send=tuple(self._lengths_G), receive=(length,) * self.inter.size)
            received_GX = self.inter.exchange(counts, splits, name=INTER + COUNTS, layer=layer).view(-1, length)
        forward_X = received_GX[:, 1:].sum(0)  # for each rank of this node: rows, pairs of each slot
        arriving = forward_X
        if self.intra.group is not None:
            splits = Splits(send=ranks, receive=(ranks[local],) * size)
            arriving = self.intra.exchange(forward_X, splits, name=INTRA + COUNTS, layer=layer)
        parts = [counts, received_GX.reshape(-1), forward_X, arriving]
        flat = self.inter.comm_stats.to_host(SPLIT_SIZES, torch.cat(parts))
        sent, received, forward, arrived = _cut(flat, [part.numel() for part in parts])
        sent_G, arrived_L = _cut(sent, self._lengths_G), _cut(arrived, [ranks[local]] * size)
        to_nodes = [_rows_and_pairs(each, self._slots_GL[i]) for i, each in enumerate(sent_G)]
        from_nodes = [_rows_and_pairs(each, slots) for each in _cut(received, [length] * self.inter.size)]
        to_ranks, from_ranks = ([(x[0], sum(x[1:])) for x in each] for each in (_cut(forward, ranks), arrived_L))
        sizes = _Sizes(
            inter=ExchangeSizes.of(node, to_nodes, from_nodes),
            intra=ExchangeSizes.of(local, to_ranks, from_ranks),
            slot_counts=tuple(sum(column) for column in zip(*(each[1:] for each in arrived_L), strict=True)),
            own_pairs=sum(_cut(sent_G[node][1:], ranks)[local][1:]),
        )
        position = self.inter.rank * self.intra.size + self.intra.rank
        for hop, each in ((INTER, sizes.inter), (INTRA, sizes.intra)):
            check_receive_rows(sum(each.rows.receive), self.max_receive_rows, position, f"one layer's {hop}hop")
        return sizes


def _make_tables(placement: ExpertPlacement, slots_GL: list[list[int]], node: int, device: torch.device) -> _Tables:
    # index of the first count of each node and of each rank, and number of the first node slot of each rank
    starts, row_bins, first_slots, at = [], [], [], 0
    for ranks in slots_GL:
        starts.append(at)
        at += 1
        for local, slots in enumerate(ranks):
            row_bins.append(at)
            first_slots.append(sum(ranks[:local]))
            at += 1 + slots
    places = list(zip(placement.rank_of_expert, placement.slot_of_expert, strict=True))

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return _Tables(
        rank_E=integers(placement.rank_of_expert),
        node_slot_E=integers([first_slots[rank] + slot for rank, slot in places]),
        row_bin_W=integers(row_bins),
        node_bin_G=integers(starts),
        pair_bin_E=integers([row_bins[rank] + 1 + slot for rank, slot in places]),
        local_X=integers([local for local, slots in enumerate(slots_GL[node]) for _ in range(slots)]),
        slot_X=integers([slot for slots in slots_GL[node] for slot in range(slots)]),
    )


def _changes(key_N: Tensor) -> Tensor:
    """Returns bools that are true for the first item of each block of equal keys."""
    first_N = torch.ones_like(key_N, dtype=torch.bool)
    first_N[1:] = key_N[1:] != key_N[:-1]
    return first_N


def _rows_and_pairs(counts: list[int], slots: list[int]) -> tuple[int, int]:
    """Returns the number of rows to a node and the number of pairs to all its ranks, from the counts for this node."""
    ranks = _cut(counts[1:], [1 + each for each in slots])
    return counts[0], sum(sum(each[1:]) for each in ranks)


def _cut(values: list[int], lengths: Sequence[int]) -> list[list[int]]:
    rest = iter(values)
    return [list(islice(rest, length)) for length in lengths]
