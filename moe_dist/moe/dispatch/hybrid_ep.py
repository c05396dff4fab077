"""Dispatch and combine by HybridEP's kernels (`deep_ep.HybridEPBuffer`, of DeepEP's branch hybrid-ep), for NVLink and RDMA.

HybridEP takes for each token a row of a map, one bool for each expert of all ranks, and weights of the same shape. A null
choice leaves no mark. (It takes ids as well, but scatters them unmasked, so that it must not see a -1.) Experts have the
numbers of `slot_numbers`, as many on every rank: a multiple of 4, which its kernels ask of the experts of an NVLink domain.

Contract and results are those of `all_to_all`: one row for each (token, destination rank), weighted and summed there, and
HybridEP's combine adds the ranks' rows without weights. What differs: rows for the own rank pass through HybridEP's buffer
too; rows are bf16 and weights fp32; all ranks must have the same number of tokens, in whole multiples of 4; D is one of 16;
the receive buffer is HybridEP's, so that `max_receive_rows` cannot be checked before it.

Collectives: HybridEP gathers the map of all ranks, then rows and weights in one; rows back; in backward the same without
the map. Host syncs: two a layer, both at the first dispatch: HybridEP waits for the number of rows that arrive, and the
adaptor reads how many pairs each slot has, with the ledger's counts. Memory: R rows and y, and HybridEP's own buffer.

Shape letters: T tokens on this rank, D hidden size, N pairs (static), W ranks, X = W E' slots of all ranks, Y slots of the
ranks of this NVLink domain, R rows here (by source rank, then by token), Q pairs computed here.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.tracker import track_collective
from moe_dist.moe.dispatch.counting import compact
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.dispatch.slot_numbers import SlotNumbers
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

COUNTS = "HybridEP pairs of each slot"  # the adaptor's host sync, as Traffic records it
_LOCAL_MAP = 4  # place in HybridEP's handle: which of the own slots each row that arrived is for, bool [>= R, E']


class Buffer(Protocol):
    """What is used of `deep_ep.HybridEPBuffer`."""

    local_rank: int  # position in the NVLink domain

    def dispatch(self, hidden: Tensor, **kwargs: Any) -> tuple[Any, ...]: ...
    def combine(self, hidden: Tensor, **kwargs: Any) -> tuple[Any, ...]: ...


def routing_map_of(
    assignments: Assignments, num_tokens: int, number_of_expert_E: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """HybridEP's map [T, X], bool, and where each pair stands in it, [N]; absent pairs stand behind its end."""
    end = num_tokens * num_slots
    number_N = number_of_expert_E[assignments.expert_N.clamp_min(0)]
    cell_N = torch.where(assignments.expert_N == ABSENT, end, assignments.token_N * num_slots + number_N)
    return _spread(torch.ones_like(cell_N, dtype=torch.bool), cell_N, num_tokens, num_slots), cell_N


def _spread(values_N: Tensor, cell_N: Tensor, num_tokens: int, num_slots: int) -> Tensor:
    """Values of pairs as [T, X], zero elsewhere. Differentiable."""
    table = values_N.new_zeros(num_tokens * num_slots + 1).scatter(0, cell_N, values_N)
    return table[:-1].view(num_tokens, num_slots)


def make_buffer(group: Any, hidden_dim: int, num_tokens: int, slots_per_rank: int) -> Buffer:
    """A `deep_ep.HybridEPBuffer` for bf16 rows of `hidden_dim`; it grows by itself for more tokens. Collective.

    Imports deep_ep, which preflight has seen to be installed.
    """
    deep_ep = import_module("deep_ep")
    return deep_ep.HybridEPBuffer(
        group=group,
        hidden_dim=hidden_dim,
        max_num_of_tokens_per_rank=num_tokens,
        num_local_experts=slots_per_rank,
        use_fp8=False,
    )


@dataclass(frozen=True)
class _Arrival:
    """What is known after the first dispatch, and used again by combine and by recompute.

    Attributes:
        handle: HybridEP's own; what combine and repeated dispatches take.
        weight_RE: Received weights of the own slots, [R, E']; a dispatch by handle carries none.
        width: Y.
        cell_Q: int64, places in [E', R] of the pairs computed here: in slot order.
        row_of_pair_Q, slot_counts: As in every plan.
        own_rows, num_remote_rows, num_pairs, num_remote_pairs: Of this rank's tokens.
    """

    handle: Any
    weight_RE: Tensor
    width: int
    cell_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]
    own_rows: int
    num_remote_rows: int
    num_pairs: int
    num_remote_pairs: int


@dataclass(frozen=True)
class HybridEPPlan:
    """Who goes where, for one layer and micro-batch, without gradient; sizes arrive with the first dispatch.

    Attributes:
        layer: Name of the layer.
        routing_map_TX, cell_N: Of `routing_map_of`.
    """

    layer: str
    routing_map_TX: Tensor
    cell_N: Tensor
    _arrived: list[_Arrival] = field(default_factory=list, repr=False)

    def arrive(self, arrival: _Arrival) -> None:
        """Settles the plan, once."""
        self._arrived.append(arrival)

    @property
    def arrived(self) -> bool:
        return bool(self._arrived)

    @property
    def arrival(self) -> _Arrival:
        if not self._arrived:
            raise AssertionError("HybridEP tells what a rank computes when rows arrive: call dispatch first")
        return self._arrived[0]

    @property
    def row_of_pair_Q(self) -> Tensor:  # noqa: N802
        return self.arrival.row_of_pair_Q

    @property
    def slot_counts(self) -> tuple[int, ...]:
        return self.arrival.slot_counts

    @property
    def num_remote_rows(self) -> int:
        return self.arrival.num_remote_rows

    @property
    def num_pairs(self) -> int:
        return self.arrival.num_pairs

    @property
    def num_remote_pairs(self) -> int:
        return self.arrival.num_remote_pairs


class HybridEPDispatcher:
    """Dispatch and combine over one EP group by a `deep_ep.HybridEPBuffer`.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's wire: for its group, rank and traffic; nothing is sent over it.
        hidden_dim: D.
        buffer: HybridEP's; made at the first plan if None.
    """

    def __init__(
        self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, buffer: Buffer | None = None
    ) -> None:
        self.placement = placement
        self.wire = wire
        self.hidden_dim = hidden_dim
        self.numbers = SlotNumbers.of(placement, multiple=4)
        self.num_slots = self.numbers.slots_per_rank * placement.num_ranks
        self._buffer = buffer
        self._number_of_expert: dict[torch.device, Tensor] = {}

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> HybridEPPlan:
        """HybridEP's map. No collective but for the buffer, with the first plan, and no host sync."""
        device = assignments.expert_N.device
        if device not in self._number_of_expert:
            self._number_of_expert[device] = torch.tensor(self.numbers.number_of_expert, device=device)
        if self._buffer is None:
            self._buffer = make_buffer(self.wire.group, self.hidden_dim, num_tokens, self.numbers.slots_per_rank)
        return HybridEPPlan(layer, *routing_map_of(assignments, num_tokens, self._number_of_expert[device], self.num_slots))

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: HybridEPPlan) -> DispatchedRows:
        """Rows [R, D], those of this rank's tokens among them in the order of source ranks, and the pairs' weights."""
        weight_TX = _spread(weight_N.float(), plan.cell_N, *plan.routing_map_TX.shape)
        rows_RD, weight_RE = _Dispatch.apply(h_TD, weight_TX, self, plan)  # pyright: ignore[reportGeneralTypeIssues]
        return DispatchedRows(rows_RD, weight_RE.t().reshape(-1)[plan.arrival.cell_Q].to(weight_N.dtype))

    def combine(self, rows_RD: Tensor, plan: HybridEPPlan) -> Tensor:
        """Sums the rows [R, D] of all ranks at home: y_TD, zero for tokens without an expert. One autograd node."""
        return _Combine.apply(rows_RD, self, plan)  # pyright: ignore[reportReturnType]

    @property
    def buffer(self) -> Buffer:
        if self._buffer is None:
            raise AssertionError("HybridEP's buffer is made with the first plan")
        return self._buffer

    def send(self, rows_TD: Tensor, plan: HybridEPPlan, *, name: str) -> Tensor:
        """The exchange of rows by the handle of a plan that has been dispatched; carries no weights, and does not sync."""
        arrival = plan.arrival
        self._count(name, arrival.num_remote_rows, rows_TD)
        with track_collective(self.wire.tracker, f"HybridEP {name}", device=rows_TD.device, layer=plan.layer):
            return self.buffer.dispatch(
                rows_TD,
                num_of_experts=self.num_slots,
                num_dispatched_tokens=arrival.weight_RE.shape[0],
                handle=arrival.handle,
            )[0]

    def send_first(self, h_TD: Tensor, weight_TX: Tensor, plan: HybridEPPlan) -> Tensor:
        """The exchange of map, rows and weights that settles the plan. Syncs with the host twice: see the module."""
        with track_collective(self.wire.tracker, "HybridEP dispatch", device=h_TD.device, layer=plan.layer):
            rows_RD, weight_RY, _, handle = self.buffer.dispatch(h_TD, routing_map=plan.routing_map_TX, probs=weight_TX)
        plan.arrive(self._settle(plan.routing_map_TX, handle, weight_RY))
        self._count("dispatch", plan.num_remote_rows, h_TD, weights=weight_RY.shape[1])
        mapped = plan.routing_map_TX.numel() * (self.placement.num_ranks - 1)
        self.wire.comm_stats.count("HybridEP routing map", mapped, payload=False)
        return rows_RD

    def send_back(self, rows_RD: Tensor, plan: HybridEPPlan, *, name: str, weight_RE: Tensor | None = None) -> Any:
        """The reduction of rows, and of weights where they are given, into this rank's tokens."""
        arrival, probs_RY = plan.arrival, None
        if weight_RE is not None:
            probs_RY = weight_RE.new_zeros(weight_RE.shape[0], arrival.width)
            probs_RY[:, self._own_columns] = weight_RE
        weights = 0 if probs_RY is None else arrival.width
        self._count(name, rows_RD.shape[0] - arrival.own_rows, rows_RD, weights=weights)
        with track_collective(self.wire.tracker, f"HybridEP {name}", device=rows_RD.device, layer=plan.layer):
            return self.buffer.combine(rows_RD, probs=probs_RY, handle=arrival.handle)

    @property
    def _own_columns(self) -> slice:
        """This rank's slots among those of its NVLink domain."""
        first = self.buffer.local_rank * self.numbers.slots_per_rank
        return slice(first, first + self.numbers.slots_per_rank)

    def _settle(self, routing_map_TX: Tensor, handle: Any, weight_RY: Tensor) -> _Arrival:
        """Reads what the rows that arrived are for."""
        size, own, slots = self.placement.num_ranks, self.wire.rank, self.numbers.slots_per_rank
        num_rows = weight_RY.shape[0]
        here_ER = handle[_LOCAL_MAP][:num_rows].t()
        rows_W = routing_map_TX.view(-1, size, slots).any(2).sum(0)
        pairs_W = routing_map_TX.view(-1, size, slots).sum((0, 2))
        counts = self.wire.comm_stats.to_host(COUNTS, torch.cat([rows_W, pairs_W, here_ER.sum(1)]))
        rows, pairs, here = counts[:size], counts[size : 2 * size], counts[2 * size :]
        cell_Q = compact(torch.arange(here_ER.numel(), device=here_ER.device), here_ER.reshape(-1), sum(here))
        return _Arrival(
            handle=handle,
            weight_RE=weight_RY[:, self._own_columns].contiguous(),
            width=weight_RY.shape[1],
            cell_Q=cell_Q,
            row_of_pair_Q=cell_Q % max(1, num_rows),
            slot_counts=tuple(here[: len(self.placement.slots[own])]),
            own_rows=rows[own],
            num_remote_rows=sum(rows) - rows[own],
            num_pairs=sum(pairs),
            num_remote_pairs=sum(pairs) - pairs[own],
        )

    def _count(self, name: str, rows: int, like: Tensor, *, weights: int = 0) -> None:
        """What is handed to HybridEP for other ranks; what its protocol adds is not known here."""
        comm_stats = self.wire.comm_stats
        comm_stats.count(f"HybridEP {name}", rows * like.shape[1] * like.element_size(), payload=True)
        if weights:
            comm_stats.count(f"HybridEP {name} weights", rows * weights * 4, payload=False)


class _Dispatch(torch.autograd.Function):
    """Dispatch, and as its backward HybridEP's combine, which adds rows and weights without weights."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_TX: Tensor, dispatcher: HybridEPDispatcher, plan: HybridEPPlan) -> Any:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        h_TD = h_TD.contiguous()
        if plan.arrived:
            rows_RD = dispatcher.send(h_TD, plan, name="dispatch")
        else:
            rows_RD = dispatcher.send_first(h_TD, weight_TX.contiguous(), plan)
        return rows_RD, plan.arrival.weight_RE.clone()  # the plan keeps its own: an output gets a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD, grad_RE = grads
        grad_TD, grad_TX = ctx.dispatcher.send_back(
            grad_RD.contiguous(), ctx.plan, name="dispatch backward", weight_RE=grad_RE.float()
        )
        return grad_TD, grad_TX, None, None


class _Combine(torch.autograd.Function):
    """Combine, and as its backward a dispatch by the same handle. Saves no tensor: `block` recompute does not repeat it."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: HybridEPDispatcher, plan: HybridEPPlan) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher.send_back(rows_RD.contiguous(), plan, name="combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.send(grads[0].contiguous(), ctx.plan, name="combine backward"), None, None
