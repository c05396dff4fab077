"""Sends one row per (token, expert) pair. All ranks know the sizes of all exchanges in advance. So ranks exchange no counts
and no ids, and no host waits for its device.

The dispatcher needs assignments with `counts_WE`: the number of pairs of each rank's tokens with each expert. In expert
choice within one rank the host knows `counts_WE` before routing, because every expert takes a fixed number of each rank's
tokens. In token choice `counts_WE` depends on the routing. The kind `all_to_all` also uses this dispatcher if each rank has
at most one expert of each group. No two pairs then have the same (token, rank), so sending one row per (token, rank) would
save no row.

The number of rows that a rank sends is the sum of its row of `counts_WE` over the experts on other ranks. Dispatch sends
these rows, combine returns as many, and backward sends as many gradients in each direction. No row is padding. Shape
letters: T tokens, D hidden size, N pairs (all taken, sorted by expert), Q pairs computed here.

The order of pairs depends only on the counts. The host computes this order once for all layers of a micro-batch, and caches
the last KEPT_ORDERS orders. The memory is that of `all_to_all`, if S is the number of (token, expert) pairs sent.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.all_to_all import Splits, split_sizes
from moe_dist.comm.collectives import from_host
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.planning import check_receive_rows
from moe_dist.moe.kernels.interface import Items
from moe_dist.moe.routing.types import Assignments
from moe_dist.placement.placement import ExpertPlacement

Counts = tuple[tuple[int, ...], ...]
KEPT_ORDERS = 16  # number of cached orders of pairs; all layers of a micro-batch use the same order


@dataclass(frozen=True)
class _Order:
    """Sizes and orders that depend only on the counts. `pair_P` sorts pairs for sending. `order_Q` sorts the pairs computed
    here by expert. `expert_N` is the expert of each of the N pairs according to the counts. `row_items` has the pair of
    each arrived row."""

    splits: Splits
    expert_N: Tensor
    pair_P: Tensor
    order_Q: Tensor
    row_items: Items
    slot_counts: tuple[int, ...]


class KnownCountsDispatcher(AllToAllDispatcher):
    """Dispatches and combines over one EP group, with known counts. All ranks make matching plans, because all have the
    same counts and placement. If assignments have no `counts_WE`, as in evaluation, in which tokens choose experts, `plan`
    works as in `AllToAllDispatcher`.
    """

    takes_known_counts = True

    def __init__(self, context: DispatchContext) -> None:
        super().__init__(context)
        self.placement, self.wire = context.placement, context.all_to_all
        self.max_receive_rows = context.max_receive_rows
        self._order = lru_cache(maxsize=KEPT_ORDERS)(self._make_order)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> AllToAllPlan:
        """Makes the plan. With known counts this costs no collective and no host sync, and pairs are sorted by (rank,
        expert), own pairs last. Raises ResourceError if more rows than `max_receive_rows` would arrive."""
        counts = assignments.counts_WE
        if counts is None:
            return super().plan(assignments, num_tokens, layer=layer)
        self._check(counts, assignments.token_N.shape[0])
        order = self._order(counts, assignments.token_N.device)  # the same order for all layers of a micro-batch

        # Wrong counts would send rows to wrong experts. The check runs on the device, because a check on the host would
        # sync.
        kept = (assignments.expert_N == order.expert_N).all()
        torch._assert_async(kept, "counts_WE: pairs are not as promised")  # pyright: ignore[reportPrivateImportUsage]
        row_S, row_O = assignments.token_N[order.pair_P].tensor_split([sum(order.splits.send)])
        return AllToAllPlan(
            layer=layer,
            prefix="",
            suffix="",
            table_rows=num_tokens,
            rows=order.splits,
            pairs=order.splits,
            row_S=row_S,
            row_O=row_O,
            pair_P=order.pair_P,
            order_Q=order.order_Q,
            row_of_pair_Q=order.order_Q,
            row_items=order.row_items,
            slot_counts=order.slot_counts,
        )

    def _check(self, counts: Counts, num_pairs: int) -> None:
        size, own = self.wire.size, self.wire.rank
        if size != self.placement.num_ranks:
            raise AssertionError(f"the wire joins {size} ranks, the placement has {self.placement.num_ranks}")
        if [len(row) for row in counts] != [self.placement.num_experts] * size or sum(counts[own]) != num_pairs:
            raise AssertionError(f"counts_WE: not {size} x {self.placement.num_experts}, or not {num_pairs} pairs here")
        rows = sum(
            counts[source][expert] for source in range(size) if source != own for expert in self.placement.slots[own]
        )
        check_receive_rows(rows, self.max_receive_rows, own, "each layer")

    def _make_order(self, counts: Counts, device: torch.device) -> _Order:
        """Computes sizes and orders on the host, and copies five lists of integers to the device."""
        own, slots = self.wire.rank, [np.array(each, dtype=np.int64) for each in self.placement.slots]
        counts_WE = np.array(counts, dtype=np.int64).reshape(len(counts), -1)
        mine_E = counts_WE[own]
        others = [rank for rank in range(self.wire.size) if rank != own]
        sent = np.concatenate([slots[rank] for rank in [*others, own]])
        arriving_WX = counts_WE[[own, *others]][:, slots[own]]  # pairs of each rank's tokens with each own slot
        first_WX = (np.cumsum(arriving_WX) - arriving_WX.ravel()).reshape(arriving_WX.shape)
        order_Q = _blocks(first_WX.T.ravel(), arriving_WX.T.ravel())
        send = [int(mine_E[each].sum()) for each in slots]
        return _Order(
            splits=Splits(split_sizes(send, own), split_sizes(counts_WE[:, slots[own]].sum(1).tolist(), own)),
            expert_N=from_host(np.repeat(np.arange(len(mine_E)), mine_E), torch.int64, device),
            pair_P=from_host(_blocks((np.cumsum(mine_E) - mine_E)[sent], mine_E[sent]), torch.int64, device),
            order_Q=from_host(order_Q, torch.int64, device),
            row_items=(
                from_host(np.argsort(order_Q), torch.int64, device),
                from_host(np.arange(len(order_Q) + 1), torch.int32, device),
            ),
            slot_counts=tuple(arriving_WX.sum(0).tolist()),
        )


def _blocks(start_X: np.ndarray, length_X: np.ndarray) -> np.ndarray:
    """Concatenates start, start + 1, ..., start + length - 1 of all blocks."""
    shift_X = start_X - (np.cumsum(length_X) - length_X)
    return np.repeat(shift_X, length_X) + np.arange(int(length_X.sum()))


def pairs_are_rows(placement: ExpertPlacement) -> bool:
    """Returns whether every rank has at most one expert of each group. A token, whose experts belong to one group, then has
    at most one pair per rank."""
    ranks = range(placement.num_ranks)
    return all(len(placement.local_experts(rank, group)) <= 1 for rank in ranks for group in placement.groups)
