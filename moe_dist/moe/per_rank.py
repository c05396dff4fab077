"""Tokens to the ranks of their experts and back: one row for each distinct (token, destination rank).

A token that takes three experts on one rank is sent once, weighted and summed there (fp32, rounded once to the wire's
dtype), and comes back once. Rows for the own rank never enter a collective. Shape letters: T tokens on this rank,
D hidden size, N pairs (static), S remote rows sent, O rows of the own rank, R = O + rows received, Q pairs computed here.

Collectives of one forward: counts, expert ids (both int, in `plan`, not repeated by recompute), pair weights and rows (one
autograd node, in `dispatch`), rows back (`combine`); of one backward: rows, then weight gradients and rows. Every rank
issues all of them, in this order, whatever its sizes.

Host syncs: one a layer, in `plan`, for the split sizes of rows, pairs and experts together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import Splits, Wire, exchange_rows, split_sizes
from moe_dist.errors import PlacementError
from moe_dist.moe.dispatcher import DispatchedRows
from moe_dist.moe.routing import ABSENT, Assignments, accumulation_dtype
from moe_dist.moe.rows import gather_rows
from moe_dist.placement.placement import ExpertPlacement

SPLIT_SIZES = "split sizes"  # the host sync of a layer, as Traffic records it


@dataclass(frozen=True)
class PerRankPlan:
    """Who goes where, for one layer and micro-batch; all of it without gradient, and kept under recompute.

    Attributes:
        layer: Name of the layer, for records and reports.
        num_tokens: T.
        rows, pairs: Split sizes of remote rows and of remote pairs.
        pair_N: int64, the taken assignments' indices: remote pairs by (rank, token), then pairs of the own rank by token.
        token_of_row_S: int64, token of each remote row, in sending order.
        token_of_row_O: int64, token of each own-rank row.
        order_Q: int64, permutation that sorts the pairs computed here ([own, received]) by slot.
        row_of_pair_Q: int64, in slot order, the row of each pair in [own rows, received rows].
        slot_counts: Pairs of each of this rank's slots.
    """

    layer: str
    num_tokens: int
    rows: Splits
    pairs: Splits
    pair_N: Tensor
    token_of_row_S: Tensor
    token_of_row_O: Tensor
    order_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]

    @property
    def num_remote_rows(self) -> int:
        return sum(self.rows.send)

    @property
    def num_pairs(self) -> int:
        return self.pair_N.shape[0]

    @property
    def num_remote_pairs(self) -> int:
        return sum(self.pairs.send)


@dataclass(frozen=True)
class _PlacementTables:
    """Rank and slot of each expert, and where each rank's counts begin."""

    rank_E: Tensor
    slot_E: Tensor
    start_W: Tensor


class PerRankDispatcher:
    """Dispatch and combine over one EP group; without a group the same code on an identity wire.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's wire; its size must be the placement's number of ranks.
        max_receive_rows: Bound of the receive buffer in rows; None for none. The bound that always holds is
            (ep - 1) x T rows of D: every token of every other rank.
    """

    def __init__(self, placement: ExpertPlacement, wire: Wire, *, max_receive_rows: int | None = None) -> None:
        self.placement = placement
        self.wire = wire
        self.max_receive_rows = max_receive_rows
        self._tables: dict[torch.device, _PlacementTables] = {}

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> PerRankPlan:
        """Decides rows and pairs from the assignments. Two metadata collectives and the layer's one host sync.

        Raises:
            PlacementError: more rows would arrive than `max_receive_rows`; nothing has been allocated yet.
        """
        if self.wire.size != self.placement.num_ranks:
            raise AssertionError(f"the wire joins {self.wire.size} ranks, the placement has {self.placement.num_ranks}")
        size, own = self.wire.size, self.wire.rank
        tables = self._tables_on(assignments.expert_N.device)
        taken_N = assignments.expert_N != ABSENT
        expert_N = assignments.expert_N.clamp_min(0)
        # Sort key: remote ranks in order, then the own rank, then what is absent; inside a rank by token, so that the
        # pairs of one row are neighbours.
        rank_N = torch.where(taken_N, tables.rank_E[expert_N], size + 1)
        rank_N = torch.where(rank_N == own, size, rank_N)
        key_N = rank_N * num_tokens + assignments.token_N
        key_N, pair_N = torch.sort(key_N, stable=True)
        first_N = torch.ones_like(key_N, dtype=torch.bool)
        first_N[1:] = key_N[1:] != key_N[:-1]

        counts = self._count(tables, expert_N, taken_N, rank_N[pair_N], first_N)
        sent, received = self._exchange_counts(counts, layer)  # the host sync
        rows = Splits(split_sizes([c[0] for c in sent], own), split_sizes([c[0] for c in received], own))
        pairs = Splits(split_sizes([sum(c[1:]) for c in sent], own), split_sizes([sum(c[1:]) for c in received], own))
        self._check_budget(sum(rows.receive))

        num_remote, num_own = sum(pairs.send), sum(sent[own][1:])
        pair_N, first_N = pair_N[: num_remote + num_own], first_N[: num_remote + num_own]
        token_of_row = _compact(assignments.token_N[pair_N], first_N, sum(rows.send) + sent[own][0])
        slot_N = tables.slot_E[expert_N[pair_N]]
        code_P = slot_N[:num_remote] * 2 + first_N[:num_remote]  # slot and "a new row begins here" in one integer
        code_Q = self.wire.exchange(code_P.to(torch.int32), pairs, name="expert ids", layer=layer).to(torch.int64)
        first_Q = torch.cat([first_N[num_remote:].to(torch.int64), code_Q % 2])
        slot_Q = torch.cat([slot_N[num_remote:], code_Q // 2])
        row_Q = first_Q.cumsum(0) - 1
        order_Q = torch.argsort(slot_Q, stable=True)
        return PerRankPlan(
            layer=layer,
            num_tokens=num_tokens,
            rows=rows,
            pairs=pairs,
            pair_N=pair_N,
            token_of_row_S=token_of_row[: sum(rows.send)],
            token_of_row_O=token_of_row[sum(rows.send) :],
            order_Q=order_Q,
            row_of_pair_Q=row_Q[order_Q],
            slot_counts=tuple(sum(column) for column in zip(*(c[1:] for c in received), strict=True)),
        )

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: PerRankPlan) -> DispatchedRows:
        """Brings each row and its pairs' weights to the experts. One autograd node for the exchange."""
        weight_N = weight_N[plan.pair_N]
        weight_P, own_weight = weight_N[: plan.num_remote_pairs], weight_N[plan.num_remote_pairs :]
        num_remote, num_own = plan.token_of_row_S.shape[0], plan.token_of_row_O.shape[0]
        both = gather_rows(h_TD, torch.cat([plan.token_of_row_S, plan.token_of_row_O]))
        rows_SD, own_OD = both.split([num_remote, num_own])
        received, weight_Q = exchange_rows(rows_SD, weight_P, self.wire, plan.rows, plan.pairs, layer=plan.layer)
        return DispatchedRows(
            rows_RD=torch.cat([own_OD, received]),
            weight_Q=torch.cat([own_weight, weight_Q])[plan.order_Q],
        )

    def combine(self, rows_RD: Tensor, plan: PerRankPlan) -> Tensor:
        """Brings the summed rows [R, D] home: y_TD, zero for tokens without an expert. One autograd node."""
        return _Combine.apply(rows_RD, self.wire, plan)  # pyright: ignore[reportReturnType]

    def _tables_on(self, device: torch.device) -> "_PlacementTables":
        """The placement as tensors, copied to `device` once."""
        if device not in self._tables:
            lengths = [1 + len(slots) for slots in self.placement.slots]
            self._tables[device] = _PlacementTables(
                rank_E=torch.tensor(self.placement.rank_of_expert, device=device),
                slot_E=torch.tensor(self.placement.slot_of_expert, device=device),
                start_W=torch.tensor([sum(lengths[:rank]) for rank in range(len(lengths))], device=device),
            )
        return self._tables[device]

    def _count(
        self, tables: "_PlacementTables", expert_N: Tensor, taken_N: Tensor, sorted_rank_N: Tensor, first_N: Tensor
    ) -> Tensor:
        """For each rank in turn: its distinct rows, then its pairs by slot; int64 [ranks + E], flat."""
        size, own = self.wire.size, self.wire.rank
        counts = torch.zeros(size + self.placement.num_experts + 1, dtype=torch.int64, device=expert_N.device)
        trash = counts.shape[0] - 1
        pair_bin_N = tables.start_W[tables.rank_E[expert_N]] + 1 + tables.slot_E[expert_N]
        pair_bin_N = torch.where(taken_N, pair_bin_N, trash)
        counts.scatter_add_(0, pair_bin_N, torch.ones_like(pair_bin_N))
        rank_N = torch.where(sorted_rank_N == size, own, sorted_rank_N).clamp_max(size - 1)
        row_bin_N = torch.where(first_N & (sorted_rank_N <= size), tables.start_W[rank_N], trash)
        counts.scatter_add_(0, row_bin_N, torch.ones_like(row_bin_N))
        return counts[:trash]

    def _exchange_counts(self, counts: Tensor, layer: str) -> tuple[list[list[int]], list[list[int]]]:
        """Counts sent to and received from each rank. Syncs with the host: sizes of all that follows are read here."""
        own = self.wire.rank
        lengths = [1 + len(slots) for slots in self.placement.slots]
        splits = Splits(send=tuple(lengths), receive=(lengths[own],) * self.wire.size)
        if self.wire.group is None:
            both = [self.wire.traffic.to_host(SPLIT_SIZES, counts)] * 2
        else:
            received = self.wire.exchange(counts, splits, name="counts", layer=layer)
            flat = self.wire.traffic.to_host(SPLIT_SIZES, torch.cat([counts, received]))
            both = [flat[: counts.shape[0]], flat[counts.shape[0] :]]
        return _cut(both[0], splits.send), _cut(both[1], splits.receive)

    def _check_budget(self, rows: int) -> None:
        if self.max_receive_rows is not None and rows > self.max_receive_rows:
            raise PlacementError(
                f"EP position {self.wire.rank} would receive {rows} rows in one layer, more than "
                f"parallel.max_receive_rows={self.max_receive_rows}; raise it if memory allows, lower train.micro_batch, "
                "or raise loss.balance so that tokens spread (docs/routing.md)"
            )


class _Combine(torch.autograd.Function):
    """Rows back to their tokens, summed in fp32. Keeps the plan, saves no tensor: under recompute of a whole block the
    recomputation ends before this exchange, which is therefore not repeated."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, wire: Wire, plan: PerRankPlan) -> Tensor:
        ctx.wire, ctx.plan = wire, plan
        num_own = plan.token_of_row_O.shape[0]
        back_SD = wire.exchange(
            rows_RD[num_own:], plan.rows.reversed(), name="combine rows", layer=plan.layer, payload=True
        )
        y_TD = rows_RD.new_zeros((plan.num_tokens, rows_RD.shape[1]), dtype=accumulation_dtype(rows_RD.dtype))
        y_TD.index_add_(0, plan.token_of_row_O, rows_RD[:num_own].to(y_TD.dtype))
        y_TD.index_add_(0, plan.token_of_row_S, back_SD.to(y_TD.dtype))
        return y_TD.to(rows_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TD,) = grads
        plan: PerRankPlan = ctx.plan
        remote_SD = grad_TD[plan.token_of_row_S]
        back = ctx.wire.exchange(remote_SD, plan.rows, name="combine rows backward", layer=plan.layer, payload=True)
        return torch.cat([grad_TD[plan.token_of_row_O], back]), None, None


def _compact(items_N: Tensor, keep_N: Tensor, num_kept: int) -> Tensor:
    """`items_N[keep_N]` with the length known beforehand, so that CUDA need not sync to learn it."""
    kept = items_N.new_empty(num_kept + 1)
    target_N = torch.where(keep_N, keep_N.to(torch.int64).cumsum(0) - 1, num_kept)
    return kept.scatter_(0, target_N, items_N)[:num_kept]


def _cut(values: list[int], lengths: tuple[int, ...]) -> list[list[int]]:
    cut, at = [], 0
    for length in lengths:
        cut.append(values[at : at + length])
        at += length
    return cut
