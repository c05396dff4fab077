"""Base of the adaptors to DeepEP's and HybridEP's kernels: numbers of experts, the plan, the autograd nodes.

Contract and results equal those of `all_to_all`: one row for each (token, destination rank), weighted and summed there, and
the kernels' combine adds the ranks' rows without weights. The differences: rows for the own rank pass through the kernels'
buffer too; rows are bf16 and weights fp32; the receive buffer is the kernels', so that `max_receive_rows` cannot be checked
before it. The first dispatch returns a handle, which combine, backward and recompute reuse.

An adaptor converts assignments and weights to its kernels' format, and makes three calls of its buffer.
Shape letters: T tokens on this rank, D hidden size, N pairs (static), R rows here (by source rank, then by token), Q pairs
computed here, X weights of a token as sent, Y weights of a row as received: one for each slot or choice.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.names import BACKWARD
from moe_dist.comm.tracker import track_collective
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class SlotNumbers:
    """The kernels' numbers of experts, as many on every rank: rank r holds [r E', (r + 1) E'), slot s of it is r E' + s.

    Attributes:
        slots_per_rank: E', the same on every rank; one at least, so that there is something to divide.
        number_of_expert: For each logical expert its number. Numbers that no slot has are never routed to.
    """

    slots_per_rank: int
    number_of_expert: tuple[int, ...]

    @classmethod
    def of(cls, placement: ExpertPlacement, *, multiple: int = 1) -> "SlotNumbers":
        """The numbering of a placement, E' the largest number of slots of a rank rounded up to a multiple."""
        slots_per_rank = max(1, *(len(slots) for slots in placement.slots))
        slots_per_rank = -(-slots_per_rank // multiple) * multiple
        places = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
        return cls(slots_per_rank, tuple(rank * slots_per_rank + slot for rank, slot in places))


@dataclass(frozen=True)
class SentCounts:
    """Of this rank's tokens: rows to itself, rows to other ranks, pairs, and pairs with other ranks' experts."""

    own_rows: int
    remote_rows: int
    pairs: int
    remote_pairs: int


@dataclass(frozen=True)
class Arrival:
    """Result of the first dispatch, without its rows.

    Attributes:
        handle: The kernels' own; combine and repeated dispatches take it.
        weight_RY: Received weights; a dispatch by handle carries none.
        pair_Q: int64, places in [R, Y] of the pairs computed here, in slot order.
        row_of_pair_Q, slot_counts: As in every plan.
    """

    handle: Any
    weight_RY: Tensor
    pair_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]


@dataclass
class KernelPlan:
    """Who goes where, for one layer and micro-batch. The first dispatch completes it."""

    layer: str
    _counts: SentCounts | None = None
    _arrival: Arrival | None = None

    @property
    def arrived(self) -> bool:
        """Whether it has been dispatched."""
        return self._arrival is not None

    def settle(self, arrival: Arrival, counts: SentCounts | None = None) -> None:
        """Completes the plan with the result of the first dispatch."""
        self._arrival, self._counts = arrival, counts or self._counts

    @property
    def arrival(self) -> Arrival:
        if self._arrival is None:
            raise AssertionError("a rank's pairs are known when rows have arrived: call dispatch first")
        return self._arrival

    @property
    def counts(self) -> SentCounts:
        if self._counts is None:
            raise AssertionError("a rank's counts are known when rows have arrived: call dispatch first")
        return self._counts

    @property
    def row_of_pair_Q(self) -> Tensor:  # noqa: N802
        return self.arrival.row_of_pair_Q

    @property
    def slot_counts(self) -> tuple[int, ...]:
        return self.arrival.slot_counts

    @property
    def num_remote_rows(self) -> int:
        return self.counts.remote_rows

    @property
    def num_pairs(self) -> int:
        return self.counts.pairs

    @property
    def num_remote_pairs(self) -> int:
        return self.counts.remote_pairs


K = TypeVar("K", bound=KernelPlan)


class KernelDispatcher(TwoStepDispatcher[K]):
    """Dispatch and combine over one EP group by a library's kernels.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's all-to-all: for its group, rank and statistics; nothing is sent over it.
        hidden_dim: D.
        multiple: Slots of a rank are rounded up to it.
        buffer: The library's; made at the first plan if None.
    """

    LIBRARY: ClassVar[str]  # first word of the collectives' names

    def __init__(
        self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, buffer: Any = None, multiple: int = 1
    ) -> None:
        self.placement, self.wire, self.hidden_dim = placement, wire, hidden_dim
        self.numbers = SlotNumbers.of(placement, multiple=multiple)
        self.num_slots = self.numbers.slots_per_rank * placement.num_ranks
        self._buffer = buffer
        self.number_of_expert_E = cache(lambda device: torch.tensor(self.numbers.number_of_expert, device=device))

    @property
    def buffer(self) -> Any:
        """The library's buffer; one serves all layers."""
        if self._buffer is None:
            raise AssertionError(f"{self.LIBRARY}'s buffer is made with the first plan")
        return self._buffer

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: K) -> DispatchedRows:
        """As `TwoStepDispatcher`; rows of this rank's tokens stand among the others, in the order of source ranks."""
        weight_TX = self.weights_of_tokens(weight_N.float(), plan)
        rows_RD, weight_RY = _Dispatch.apply(h_TD, weight_TX, self, plan)  # pyright: ignore[reportGeneralTypeIssues]
        return DispatchedRows(rows_RD, weight_RY.reshape(-1)[plan.arrival.pair_Q].to(weight_N.dtype))

    def combine(self, rows_RD: Tensor, plan: K) -> Tensor:
        """As `TwoStepDispatcher`. One autograd node."""
        return _Combine.apply(rows_RD, self, plan)  # pyright: ignore[reportReturnType]

    @abstractmethod
    def weights_of_tokens(self, weight_N: Tensor, plan: K) -> Tensor:
        """The pairs' weights as the kernels take them, [T, X]. Differentiable."""

    @abstractmethod
    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: K) -> tuple[Any, ...]:
        """The kernels' dispatch of rows and weights. Waits on the host for the number of rows that arrive."""

    @abstractmethod
    def settle(self, received: tuple[Any, ...], plan: K) -> Tensor:
        """Completes the plan with the result of `first_dispatch`; returns the rows [R, D]."""

    @abstractmethod
    def dispatch_again(self, rows_TD: Tensor, plan: K) -> Tensor:
        """The kernels' dispatch by the handle of a complete plan; carries no weights."""

    @abstractmethod
    def reduce(self, rows_RD: Tensor, plan: K, weight_RY: Tensor | None) -> tuple[Tensor, Any]:
        """The kernels' combine of rows, and of weights where they are given, into this rank's tokens."""

    @abstractmethod
    def weight_bytes(self, plan: K) -> int:
        """Bytes of one row's weights, and of ids that are sent with them."""

    def send(self, rows_TD: Tensor, plan: K, name: str, weight_TX: Tensor | None = None) -> Tensor:
        """Rows to their experts' ranks; with weights where the plan is not complete yet."""
        with track_collective(self.wire.tracker, f"{self.LIBRARY} {name}", device=rows_TD.device, layer=plan.layer):
            if weight_TX is None:
                rows_RD, received = self.dispatch_again(rows_TD, plan), None
            else:
                rows_RD, received = rows_TD, self.first_dispatch(rows_TD, weight_TX, plan)
        if received is not None:
            rows_RD = self.settle(received, plan)
        self._count(name, plan.num_remote_rows, rows_TD, 0 if weight_TX is None else self.weight_bytes(plan))
        return rows_RD

    def send_back(self, rows_RD: Tensor, plan: K, name: str, weight_RY: Tensor | None = None) -> tuple[Tensor, Any]:
        """Sums of rows, and of weights where they are given, into this rank's tokens."""
        rows = rows_RD.shape[0] - plan.counts.own_rows
        self._count(name, rows, rows_RD, 0 if weight_RY is None else self.weight_bytes(plan))
        with track_collective(self.wire.tracker, f"{self.LIBRARY} {name}", device=rows_RD.device, layer=plan.layer):
            return self.reduce(rows_RD, plan, weight_RY)

    def _count(self, name: str, rows: int, like: Tensor, weight_bytes: int) -> None:
        """Bytes handed to the kernels for other ranks; the bytes that their protocol adds are not known here."""
        comm_stats = self.wire.comm_stats
        comm_stats.count(f"{self.LIBRARY} {name}", rows * like.shape[1] * like.element_size(), payload=True)
        if weight_bytes:
            comm_stats.count(f"{self.LIBRARY} {name} weights", rows * weight_bytes, payload=False)


class _Dispatch(torch.autograd.Function):
    """Dispatch; its backward is the kernels' combine, which adds rows and weights without weights."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_TX: Tensor, dispatcher: KernelDispatcher[Any], plan: KernelPlan) -> Any:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        weights = None if plan.arrived else weight_TX.contiguous()
        rows_RD = dispatcher.send(h_TD.contiguous(), plan, "dispatch", weights)
        return rows_RD, plan.arrival.weight_RY.clone()  # the plan keeps its own: an output gets a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD, grad_RY = grads
        name, weights = "dispatch" + BACKWARD, grad_RY.float().contiguous()
        return *ctx.dispatcher.send_back(grad_RD.contiguous(), ctx.plan, name, weights), None, None


class _Combine(torch.autograd.Function):
    """Combine; its backward is a dispatch by the same handle. Saves no tensor: `block` recompute does not repeat it."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: KernelDispatcher[Any], plan: KernelPlan) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher.send_back(rows_RD.contiguous(), plan, "combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.send(grads[0].contiguous(), ctx.plan, "combine" + BACKWARD), None, None
