"""One row for each (token, expert) pair, with sizes known beforehand: no counts or ids are exchanged, and nothing syncs.

It takes assignments that carry `counts_WE`: how many pairs each rank sends to each expert, known without reading the
routing. Per-rank expert choice is of that kind, since every expert takes its capacity of each rank's tokens. Token choice
is not. Where a rank holds at most one expert of a group, a pair is a distinct (token, rank), so that nothing is left to
deduplicate: `KnownCountsDispatcher` then takes this way, whatever the dispatcher it stands before.

Closed form: a rank sends the sum of `counts_WE` of its row over all experts of other ranks: that many rows of D forward, as
many come home, and the same in backward. No row is padding. Shape letters: T tokens on this rank, D hidden size, N pairs
(all taken, sorted by expert), R = Q pairs computed here.

Collectives: pair weights and rows (`dispatch`), rows back (`combine`), and their gradients; every rank issues all of them.
Host syncs: none. The order of pairs is a function of the counts, made on the host and copied once for all layers of a
micro-batch; the last few are kept.

Memory: the formula of `all_to_all`, (R + S + T) x D, with S rows for the pairs sent.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Splits, split_sizes
from moe_dist.errors import PlacementError
from moe_dist.moe.dispatch.exchange import Hop, combine_hop, dispatch_hop
from moe_dist.moe.dispatch.interface import DispatchedRows, Dispatcher, DispatchPlan
from moe_dist.moe.routing import Assignments
from moe_dist.placement.placement import ExpertPlacement

Counts = tuple[tuple[int, ...], ...]
KEPT_ORDERS = 16  # counts differ between micro-batches; recomputation and all layers of one ask for the same


@dataclass(frozen=True)
class KnownCountsPlan:
    """Who goes where, for one layer and micro-batch; all of it without gradient, and kept under recompute.

    Attributes:
        hop: The exchange; its rows are the pairs, its table the tokens.
        pair_N: int64, pairs by (rank, expert), those of the own rank last.
        row_of_pair_Q: int64, in slot order, the row of each pair in [own rows, received rows].
        slot_counts: Pairs of each of this rank's slots.
    """

    hop: Hop
    pair_N: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]

    @property
    def num_remote_rows(self) -> int:
        return sum(self.hop.rows.send)

    @property
    def num_pairs(self) -> int:
        return self.pair_N.shape[0]

    @property
    def num_remote_pairs(self) -> int:
        return self.num_remote_rows


@dataclass(frozen=True)
class _Order:
    """What follows from the counts alone: sizes, and as tensors the sending order and the experts' order."""

    splits: Splits
    expert_N: Tensor
    pair_N: Tensor
    order_Q: Tensor
    slot_counts: tuple[int, ...]


class PairDispatcher:
    """Dispatch and combine over one EP group; without a group the same code on an identity wire.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's wire.
        max_receive_rows: Bound of the receive buffer in rows; None for none.
    """

    def __init__(self, placement: ExpertPlacement, wire: AllToAll, *, max_receive_rows: int | None = None) -> None:
        self.placement = placement
        self.wire = wire
        self.max_receive_rows = max_receive_rows
        self._orders: dict[tuple[Counts, torch.device], _Order] = {}

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> KnownCountsPlan:
        """Decides who goes where, without a collective or a host sync (but for the first plan of new counts).

        Raises:
            PlacementError: the assignments have no counts, or more rows would arrive than `max_receive_rows`.
        """
        counts = assignments.counts_WE
        if counts is None:
            raise PlacementError(
                "parallel.dispatch.kind=known_counts needs the number of pairs of each rank and expert beforehand, which this "
                "router's choices do not fix (token choice never does); take parallel.dispatch.kind=all_to_all, or a router "
                "whose experts choose a fixed number of each rank's tokens (docs/parallelism.md)"
            )
        self._check(counts, assignments.token_N.shape[0])
        device = assignments.token_N.device
        order = self._orders.pop((counts, device), None) or self._order(counts, device)
        self._orders[counts, device] = order  # the last used stands last
        while len(self._orders) > KEPT_ORDERS:
            del self._orders[next(iter(self._orders))]
        # A broken promise would bring rows to the wrong experts. Checked on the device: no sync, one comparison of N ids.
        kept = (assignments.expert_N == order.expert_N).all()
        torch._assert_async(kept, "counts_WE: pairs are not as promised")  # pyright: ignore[reportPrivateImportUsage]
        token_N = assignments.token_N[order.pair_N]
        num_out = sum(order.splits.send)
        hop = Hop("", layer, num_tokens, order.splits, order.splits, row_S=token_N[:num_out], row_O=token_N[num_out:])
        return KnownCountsPlan(hop, order.pair_N, order.order_Q, order.slot_counts)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: KnownCountsPlan) -> DispatchedRows:
        """Brings each pair's row and weight to its expert. One autograd node."""
        rows_RD, weight_R = dispatch_hop(h_TD, weight_N[plan.pair_N], self.wire, plan.hop)
        return DispatchedRows(rows_RD=rows_RD, weight_Q=weight_R[plan.row_of_pair_Q])

    def combine(self, rows_RD: Tensor, plan: KnownCountsPlan) -> Tensor:
        """Brings the weighted rows [R, D] home and sums them: y_TD, zero for tokens without an expert. One autograd
        node."""
        return combine_hop(rows_RD, self.wire, plan.hop)

    def _check(self, counts: Counts, num_pairs: int) -> None:
        size, own = self.wire.size, self.wire.rank
        if size != self.placement.num_ranks:
            raise AssertionError(f"the wire joins {size} ranks, the placement has {self.placement.num_ranks}")
        if [len(row) for row in counts] != [self.placement.num_experts] * size or sum(counts[own]) != num_pairs:
            raise AssertionError(f"counts_WE: not {size} x {self.placement.num_experts}, or not {num_pairs} pairs here")
        rows = sum(
            counts[source][expert] for source in range(size) if source != own for expert in self.placement.slots[own]
        )
        if self.max_receive_rows is not None and rows > self.max_receive_rows:
            raise PlacementError(
                f"EP position {own} receives {rows} rows in each layer, more than "
                f"parallel.max_receive_rows={self.max_receive_rows}; raise it if memory allows, or lower the experts' "
                "capacity or train.micro_batch"
            )

    def _order(self, counts: Counts, device: torch.device) -> _Order:
        """Sizes and orders, from the counts alone; three lists of integers go to the device."""
        own, slots = self.wire.rank, [np.array(each, dtype=np.int64) for each in self.placement.slots]
        counts_WE = np.array(counts, dtype=np.int64).reshape(len(counts), -1)
        mine_E = counts_WE[own]
        others = [rank for rank in range(self.wire.size) if rank != own]
        sent = np.concatenate([slots[rank] for rank in [*others, own]])
        arriving = counts_WE[[own, *others]][:, slots[own]]  # by (rank, slot)
        first = (np.cumsum(arriving) - arriving.ravel()).reshape(arriving.shape)
        send = [int(mine_E[slots[rank]].sum()) for rank in range(self.wire.size)]
        return _Order(
            splits=Splits(split_sizes(send, own), split_sizes(counts_WE[:, slots[own]].sum(1).tolist(), own)),
            expert_N=_on_device(np.repeat(np.arange(len(mine_E)), mine_E), device),
            pair_N=_on_device(_runs((np.cumsum(mine_E) - mine_E)[sent], mine_E[sent]), device),
            order_Q=_on_device(_runs(first.T.ravel(), arriving.T.ravel()), device),
            slot_counts=tuple(arriving.sum(0).tolist()),
        )


def _runs(start_X: np.ndarray, length_X: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of each run, one after the other."""
    shift_X = start_X - (np.cumsum(length_X) - length_X)
    return np.repeat(shift_X, length_X) + np.arange(int(length_X.sum()))


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """As int64 on the device; to CUDA from pinned memory, so that the host does not wait for the copy."""
    tensor = torch.from_numpy(values.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class KnownCountsDispatcher:
    """The way without a sync where there is one, else the dispatcher behind it.

    It is taken where the counts are known and each rank holds at most one expert of a group: then pairs are rows, and the
    bytes are those of `all_to_all`. Every rank decides alike, since counts and placement are the same on all.

    Args:
        general: For all other assignments.
        pairs: Over the same ranks.
        always: Take it wherever the counts are known, also where a rank has several experts of a group and a row travels
            once for each.
    """

    def __init__(self, general: Dispatcher[Any], pairs: PairDispatcher, *, always: bool = False) -> None:
        self.general = general
        self.pairs = pairs
        self.distinct = always or pairs_are_rows(pairs.placement)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DispatchPlan:
        """The plan of either; see there for collectives, syncs and errors."""
        way: Dispatcher[Any] = self.pairs if self.distinct and assignments.counts_WE is not None else self.general
        return way.plan(assignments, num_tokens, layer=layer)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> DispatchedRows:
        """Brings each row, and its pairs' weights, to the experts."""
        return self._way(plan).dispatch(h_TD, weight_N, plan)

    def combine(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """Brings the summed rows [R, D] home."""
        return self._way(plan).combine(rows_RD, plan)

    def _way(self, plan: DispatchPlan) -> Dispatcher[Any]:
        return self.pairs if isinstance(plan, KnownCountsPlan) else self.general


def pairs_are_rows(placement: ExpertPlacement) -> bool:
    """Whether every rank holds at most one expert of each group: a token, routed in one group, then has one pair a rank."""
    ranks = range(placement.num_ranks)
    return all(len(placement.local_experts(rank, group)) <= 1 for rank in ranks for group in placement.groups)
