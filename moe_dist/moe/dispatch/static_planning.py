"""Makes the plans of exchanges of fixed sizes. `static.py` explains the room (these sizes) and the shape letters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Splits, split_sizes
from moe_dist.comm.names import COUNTS, PAIR_ROWS
from moe_dist.moe.dispatch.exchange import ExchangePlan
from moe_dist.moe.dispatch.planning import DispatchPlanner
from moe_dist.moe.kernels.interface import Items, RowIndex
from moe_dist.moe.kernels.torch_kernels import counting_order
from moe_dist.moe.routing.types import Assignments
from moe_dist.placement.placement import ExpertPlacement, group_shares

KEPT_SIZES = 8  # largest number of cached tables; each number of tokens in training or evaluation needs one


@dataclass(frozen=True)
class StaticRoom:
    """The room of one layer: the fixed numbers of rows and pairs. All ranks have the same `StaticRoom`.

    Attributes:
        rows_W, pairs_W: Largest numbers of rows and of pairs that a rank may send to each other rank.
        computed_WG: Largest number of (token, expert) pairs of each group that each rank may compute.
    """

    rows_W: tuple[int, ...]
    pairs_W: tuple[int, ...]
    computed_WG: tuple[tuple[int, ...], ...]

    @classmethod
    def expected(cls, placement: ExpertPlacement, tokens: int, factor: float) -> "StaticRoom":
        """Returns `factor` times the expected numbers for `tokens` tokens per rank, limited to the largest possible
        numbers."""
        groups, ep = placement.groups, placement.num_ranks
        rows, pairs, computed = [], [], []
        for rank in range(ep):
            held_G = [len(placement.local_experts(rank, group)) for group in groups]
            groups_of = list(zip(groups, group_shares(groups, {}), held_G, strict=True))
            reached = sum(share * group.reached(held) for group, share, held in groups_of)
            pairs_G = [
                share * group.expected_experts_per_token * held / group.num_experts for group, share, held in groups_of
            ]
            most_G = [min(group.top_k, held) for group, _, held in groups_of]
            rows.append(min(tokens, math.ceil(factor * tokens * reached)))
            pairs.append(min(tokens * max(most_G), math.ceil(factor * tokens * sum(pairs_G))))
            of_groups = zip(pairs_G, most_G, strict=True)
            computed.append(
                tuple(min(ep * tokens * most, math.ceil(factor * ep * tokens * each)) for each, most in of_groups)
            )
        return cls(tuple(rows), tuple(pairs), tuple(computed))


@dataclass(frozen=True)
class PaddedIndex(RowIndex):
    """A `RowIndex` in which items without a row have the row `padding`. `items_of_rows` does not contain these items."""

    padding: int = 0

    @cached_property
    def items_of_rows(self) -> Items:
        row_N = torch.cat(self.parts)
        row_N = torch.where(row_N == self.padding, self.num_rows, row_N).to(torch.int32)
        return RowIndex((row_N,), self.num_rows).items_of_rows


@dataclass(frozen=True)
class StaticPlan(ExchangePlan):
    """The plan of an exchange of fixed sizes. `order_Q` is None, because `arrival_Q` sorts the weights after the exchange.

    Attributes:
        arrival_Q: int64, for each pair computed here, its index in the order of arrival; A for padding. Pairs are sorted by
            slot. The padding of a group comes after the group's last slot.
        row_of_pair_Q: int64, row in [0, R) of each pair computed here; T for padding.
        room_G: Number of pairs of each group, including padding.
        counts_X: int64, number of pairs of each slot.
        end_X: int32, number of pairs of the slot and of all earlier slots of its group; at most the group's room.
    """

    arrival_Q: Tensor
    row_of_pair_Q: Tensor
    room_G: tuple[int, ...]
    counts_X: Tensor
    end_X: Tensor
    sent_5: Tensor

    @cached_property
    def table_index(self) -> RowIndex:
        parts = (self.row_O, self.row_S)
        return PaddedIndex(parts, self.table_rows, padding=self.table_rows - 1)

    def pair_index(self, num_rows: int) -> RowIndex:
        """The index that gives the row of each pair computed here."""
        return PaddedIndex((self.row_of_pair_Q,), num_rows, padding=self.table_rows - 1)

    @property
    def sent(self) -> Tensor:
        return self.sent_5


@dataclass(frozen=True)
class _Places:
    """The places of pairs and rows in the lists of a plan, on the device. For a given number of tokens, these depend only
    on the room.

    Attributes:
        place_J, nth_J: For each pair, the index of its destination in the order of sending (other ranks, then this rank),
            and the pair's index among the pairs to this destination.
        most_rows_J: Largest number of rows that the room allows for the pair's destination.
        row_J: Index, among the S rows, of the first row to the pair's destination; not used for own pairs.
        row_A: Row in [0, R) of the first row of the rank from which each pair arrives; 0 for own pairs.
        first_H: Index, in the order of arrival, of the first pair from each rank.
        token_O: The row of the table of each own row.
    """

    place_J: Tensor
    nth_J: Tensor
    most_rows_J: Tensor
    row_J: Tensor
    row_A: Tensor
    first_H: Tensor
    token_O: Tensor
    number_Q: Tensor


@dataclass(frozen=True)
class _Fixed:
    """The placement and the room as tensors on the device.

    Attributes:
        first_bin: Bin of the first expert of the rank at each place, then E.
        source_H: Ranks in the order of arrival.
        run_order: Index of each run's length in a list: first the lengths by (slot, source rank), then the lengths of the
            groups' padding. Runs are sorted by slot, then source rank. The padding of a group follows its last slot.
        rows_W, pairs_W, computed_G: The room of each place (without this rank's) and of each group.
    """

    first_bin: Tensor
    source_H: Tensor
    group_X: Tensor
    run_order: Tensor
    rows_W: Tensor
    pairs_W: Tensor
    computed_G: Tensor


class StaticPlanner(DispatchPlanner):
    """Makes plans of fixed sizes. `StaticDispatcher` describes the arguments."""

    def __init__(self, placement: ExpertPlacement, wire: AllToAll, room: StaticRoom) -> None:
        super().__init__(placement, wire)
        self.room, own = room, wire.rank
        self.others = [rank for rank in range(wire.size) if rank != own]
        self.rows = Splits(split_sizes(room.rows_W, own), split_sizes([room.rows_W[own]] * wire.size, own))
        self.pairs = Splits(split_sizes(room.pairs_W, own), split_sizes([room.pairs_W[own]] * wire.size, own))
        self._fixed_on = lru_cache(maxsize=KEPT_SIZES)(self._make_fixed)
        self._places_on = lru_cache(maxsize=KEPT_SIZES)(self._make_places)

    def static_plan(self, assignments: Assignments, num_tokens: int, layer: str) -> StaticPlan:
        """Makes the plan by two metadata collectives, without a host sync."""
        device, num_pairs = assignments.expert_N.device, assignments.expert_N.shape[0]
        tables, fixed = self._tables_on(device), self._fixed_on(device)
        places = self._places_on(num_tokens, num_pairs, device)
        cells = self._cells(assignments, num_tokens, tables)
        order_N = counting_order(cells.bin_N, self.placement.num_experts + 1)
        message = torch.cat([cells.row_counts, cells.pair_counts])[tables.message_M]
        arriving_HX = self._exchange(message, layer)[:, 1:].index_select(0, fixed.source_H)

        start_W = F.pad(cells.pair_counts.cumsum(0), (1, 0)).index_select(0, fixed.first_bin)
        count_W = start_W.diff()
        taken_J = places.nth_J < count_W.index_select(0, places.place_J)
        at_J = torch.where(taken_J, start_W.index_select(0, places.place_J) + places.nth_J, num_pairs)
        pair_J = F.pad(order_N, (0, 1), value=num_pairs).index_select(0, at_J)
        index_J = F.pad(cells.index_N.to(torch.int64), (0, 1), value=-1).index_select(0, pair_J)
        token_J = F.pad(assignments.token_N, (0, 1), value=num_tokens).index_select(0, pair_J)
        sent = slice(0, sum(self.pairs.send))
        lost_S = index_J[sent] >= places.most_rows_J
        index_S = torch.where(lost_S, -1, index_J[sent])
        pair_J[sent].masked_fill_(lost_S, num_pairs)
        arrived = self.wire.start(index_S.to(torch.int32), self.pairs, name=PAIR_ROWS, layer=layer)
        num_rows = sum(self.rows.send)
        row_S = torch.full((num_rows + 1,), num_tokens, dtype=torch.int64, device=device)
        row_S.scatter_(0, torch.where(index_S < 0, num_rows, places.row_J + index_S), token_J[sent])

        arrival_Q, counts_X, end_X, over = self._by_slot(arriving_HX, places, fixed)
        index_A = torch.cat([token_J[sent.stop :], arrived.wait().to(torch.int64)])
        row_A = torch.where(index_A < 0, num_tokens, places.row_A + index_A)
        return StaticPlan(
            layer=layer,
            prefix="",
            suffix="",
            table_rows=num_tokens + 1,
            rows=self.rows,
            pairs=self.pairs,
            row_S=row_S[:-1],
            row_O=places.token_O,
            pair_P=pair_J,
            order_Q=None,
            arrival_Q=arrival_Q,
            row_of_pair_Q=F.pad(row_A, (0, 1), value=num_tokens).index_select(0, arrival_Q),
            room_G=self.room.computed_WG[self.wire.rank],
            counts_X=counts_X,
            end_X=end_X,
            sent_5=self._sent(cells.row_counts, count_W, over, fixed),
        )

    def _exchange(self, message: Tensor, layer: str) -> Tensor:
        """Exchanges the counts. Returns each source rank's numbers of rows and of pairs per slot, int64 [W, 1 + X]."""
        if self.wire.group is None:  # a single rank receives its own counts
            return message[None]
        lengths, own, size = [1 + len(slots) for slots in self.placement.slots], self.wire.rank, self.wire.size
        splits = Splits(send=tuple(lengths), receive=(lengths[own],) * size)
        return self.wire.exchange(message, splits, name=COUNTS, layer=layer).view(size, lengths[own])

    def _by_slot(self, arriving_HX: Tensor, places: _Places, fixed: _Fixed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the plan's `arrival_Q`, `counts_X` and `end_X`, and each group's number of pairs that exceed the room
        [G]."""
        total_X = arriving_HX.sum(0)
        total_G = torch.zeros_like(fixed.computed_G).scatter_add_(0, fixed.group_X, total_X)
        padding_G = (fixed.computed_G - total_G).clamp_min(0)
        first_HX = arriving_HX.cumsum(1) - arriving_HX + places.first_H[:, None]
        end = places.row_A.shape[0]
        lengths = torch.cat([arriving_HX.t().flatten(), padding_G]).index_select(0, fixed.run_order)
        first = torch.cat([first_HX.t().flatten(), torch.full_like(padding_G, end)]).index_select(0, fixed.run_order)
        last = lengths.cumsum(0)
        run_Q = torch.searchsorted(last, places.number_Q, right=True)
        arrival_Q = (places.number_Q + (first - last + lengths).index_select(0, run_Q)).clamp_max(end)
        before_G = total_G.cumsum(0) - total_G
        end_X = (total_X.cumsum(0) - before_G[fixed.group_X]).minimum(fixed.computed_G[fixed.group_X])
        return arrival_Q, total_X, end_X.to(torch.int32), (total_G - fixed.computed_G).clamp_min(0)

    def _sent(self, row_counts: Tensor, count_W: Tensor, over_G: Tensor, fixed: _Fixed) -> Tensor:
        rows_W, pairs_W = row_counts[:-1], count_W[:-1]  # the last place is this rank
        over = (rows_W - fixed.rows_W).clamp_min(0).sum() + (pairs_W - fixed.pairs_W).clamp_min(0).sum() + over_G.sum()
        rows = rows_W.sum()
        return torch.stack([rows, count_W.sum(), pairs_W.sum(), sum(self.rows.send) - rows, over])

    def _make_fixed(self, device: torch.device) -> _Fixed:
        own, slots, groups = self.wire.rank, self.placement.slots, self.placement.groups
        lengths = [len(slots[rank]) for rank in [*self.others, own]]
        local = [len(self.placement.local_experts(own, group)) for group in groups]
        size, num_runs = self.wire.size, sum(local) * self.wire.size
        runs, at = [], 0
        for group, count in enumerate(local):
            runs += [*range(at, at + count * size), num_runs + group]
            at += count * size
        rows, pairs = ([room[rank] for rank in self.others] for room in (self.room.rows_W, self.room.pairs_W))
        tensors = (
            [0, *accumulate(lengths)],
            [own, *self.others],
            [group for group, count in enumerate(local) for _ in range(count)],
            runs,
            rows,
            pairs,
            self.room.computed_WG[own],
        )
        return _Fixed(*(torch.tensor(each, dtype=torch.int64, device=device) for each in tensors))

    def _make_places(self, num_tokens: int, num_pairs: int, device: torch.device) -> _Places:
        own, room, others = self.wire.rank, self.room, self.others
        pairs = [*(room.pairs_W[rank] for rank in others), num_pairs]
        most, arriving = [room.rows_W[rank] for rank in others], [num_pairs] + [room.pairs_W[own]] * len(others)
        first_rows = [0] + [num_tokens + 1 + nth * room.rows_W[own] for nth in range(len(others))]
        tensors = (
            _each(range(len(pairs)), pairs),
            [nth for count in pairs for nth in range(count)],
            _each(most, pairs),
            _each(_starts(most), pairs),
            _each(first_rows, arriving),
            _starts(arriving),
            range(num_tokens + 1),
            range(sum(room.computed_WG[own])),
        )
        return _Places(*(torch.tensor(list(each), dtype=torch.int64, device=device) for each in tensors))


def _starts(lengths: Sequence[int]) -> list[int]:
    return [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _each(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Repeats the i-th value as often as the i-th count says. Ignores additional counts."""
    return [value for value, count in zip(values, counts, strict=False) for _ in range(count)]
