"""One row for each (token, expert) pair, with sizes known beforehand: no counts or ids are exchanged, and nothing syncs.

It takes assignments that carry `counts_WE`: how many pairs each rank sends to each expert, known without reading the
routing. Expert choice within one rank is of that kind, since every expert takes its capacity of each rank's tokens. Token
choice is not. Where a rank holds at most one expert of a group, a pair is a distinct (token, rank), so that nothing is left
to deduplicate: `KnownCountsFirst` then takes it before any other dispatcher.

Closed form: a rank sends the sum of `counts_WE` of its row over all experts of other ranks: that many rows of D in
dispatch, as many back in combine, and the same in backward. No row is padding. Shape letters: T tokens, D hidden size,
N pairs (all taken, sorted by expert), Q pairs computed here.

Collectives: pair weights and rows (`dispatch`), rows back (`combine`), and their gradients; every rank issues all of them.
Host syncs: none. The order of pairs is a function of the counts, made on the host and copied once for all layers of a
micro-batch; the last few are kept. Memory: the formula of `all_to_all`, with S rows for the pairs sent.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Splits, split_sizes
from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.exchange import AllToAllPlan, Exchange, ExchangeDispatcher
from moe_dist.moe.dispatch.interface import DispatchedRows, DispatchPlan, TwoStepDispatcher
from moe_dist.moe.dispatch.planning import check_receive_rows
from moe_dist.moe.routing import Assignments
from moe_dist.placement.placement import ExpertPlacement

Counts = tuple[tuple[int, ...], ...]
KEPT_ORDERS = 16  # counts differ between micro-batches; recomputation and all layers of one ask for the same


class KnownCountsPlan(AllToAllPlan):
    """An exchange whose rows are its pairs; those of this rank's tokens by (rank, expert), the own rank's last."""


@dataclass(frozen=True)
class _Order:
    """What follows from the counts alone: sizes, and as tensors the sending order and the experts' order."""

    splits: Splits
    expert_N: Tensor
    pair_P: Tensor
    order_Q: Tensor
    slot_counts: tuple[int, ...]


class KnownCountsDispatcher(ExchangeDispatcher[KnownCountsPlan]):
    """Dispatch and combine over one EP group; without a group the same code on the identity all-to-all.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's all-to-all.
        max_receive_rows: Bound of the receive buffer in rows; None for none.
    """

    def __init__(self, placement: ExpertPlacement, wire: AllToAll, *, max_receive_rows: int | None = None) -> None:
        self.placement = placement
        self.wire = wire
        self.exchange = Exchange(wire)
        self.max_receive_rows = max_receive_rows
        self._order = lru_cache(maxsize=KEPT_ORDERS)(self._make_order)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> KnownCountsPlan:
        """Decides who goes where, without a collective or a host sync (but for the first plan of new counts).

        Raises:
            ConfigError: the assignments have no counts: the router does not fix them.
            ResourceError: more rows would arrive than `max_receive_rows`.
        """
        counts = assignments.counts_WE
        if counts is None:
            raise ConfigError(
                "parallel.dispatch.kind=known_counts needs the number of pairs of each rank and expert beforehand, which "
                "this router's choices do not fix (token choice never does); take parallel.dispatch.kind=all_to_all, or a "
                "router whose experts choose a fixed number of each rank's tokens (docs/parallelism.md)"
            )
        self._check(counts, assignments.token_N.shape[0])
        order = self._order(counts, assignments.token_N.device)
        # A broken promise would bring rows to the wrong experts. Checked on the device: no sync, one comparison of N ids.
        kept = (assignments.expert_N == order.expert_N).all()
        torch._assert_async(kept, "counts_WE: pairs are not as promised")  # pyright: ignore[reportPrivateImportUsage]
        row_S, row_O = assignments.token_N[order.pair_P].tensor_split([sum(order.splits.send)])
        return KnownCountsPlan(
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
            pair_P=_on_device(_runs((np.cumsum(mine_E) - mine_E)[sent], mine_E[sent]), device),
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


class KnownCountsFirst(TwoStepDispatcher[DispatchPlan]):
    """`KnownCountsDispatcher` for assignments that carry counts, another dispatcher for all others.

    By default the first is taken only where each rank holds at most one expert of a group: then pairs are rows, and the
    bytes are those of `all_to_all`. Every rank decides alike, since counts and placement are the same on all.

    Args:
        known: For assignments with counts.
        general: For all others, over the same ranks.
        always: Take the first wherever the counts are known, also where a rank has several experts of a group and a row
            travels once for each.
    """

    def __init__(self, known: KnownCountsDispatcher, general: TwoStepDispatcher[Any], *, always: bool = False) -> None:
        self.known = known
        self.general = general
        self.takes_known_counts = always or pairs_are_rows(known.placement)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DispatchPlan:
        """The plan of either; see there for collectives, syncs and errors."""
        known = self.takes_known_counts and assignments.counts_WE is not None
        dispatcher: TwoStepDispatcher[Any] = self.known if known else self.general
        return dispatcher.plan(assignments, num_tokens, layer=layer)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: DispatchPlan) -> DispatchedRows:
        """As `TwoStepDispatcher`."""
        return self._of(plan).dispatch(h_TD, weight_N, plan)

    def combine(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """As `TwoStepDispatcher`."""
        return self._of(plan).combine(rows_RD, plan)

    def _of(self, plan: DispatchPlan) -> TwoStepDispatcher[Any]:
        return self.known if isinstance(plan, KnownCountsPlan) else self.general


def pairs_are_rows(placement: ExpertPlacement) -> bool:
    """Whether every rank holds at most one expert of each group: a token, routed in one group, then has one pair a rank."""
    ranks = range(placement.num_ranks)
    return all(len(placement.local_experts(rank, group)) <= 1 for rank in ranks for group in placement.groups)
