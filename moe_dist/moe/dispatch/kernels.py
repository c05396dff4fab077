"""Defines the base class of the dispatchers (adaptors) that call DeepEP's or HybridEP's kernels.

Results equal those of `all_to_all`: one row is sent per (token, destination rank). That rank sums its experts' weighted
outputs, and the kernels' combine adds the sums of the ranks. Three things differ from `all_to_all`. Rows that stay on their
rank pass through the kernels' buffer too. Rows must be bf16, and weights fp32. The kernels allocate the receive buffer, so
`max_receive_rows` cannot be checked before the allocation. The first dispatch returns a handle for the calls in combine,
backward and recompute.

An adaptor converts assignments and weights to the format of its kernels, and calls its library's buffer in
`first_dispatch`, `dispatch_again` and `reduce`. Shape letters: T tokens on this rank, D hidden size, N (token, expert)
pairs (absent pairs included), R rows for this rank's experts (sorted by source rank, then by token), Q pairs computed here,
X weights sent per token and Y weights received per row (DeepEP: one per choice; HybridEP: one per slot).
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
from moe_dist.moe.dispatch.interface import DispatchedRows, SentCounts, TwoStepDispatcher
from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class SlotNumbers:
    """Numbers the experts for the kernels, which need equally many slots (E') on every rank: slot s of rank r is r E' + s.

    Attributes:
        slots_per_rank: E', at least 1, because the kernels divide by E'.
        number_of_expert: Number of each logical expert. Numbers without an expert get no token.
    """

    slots_per_rank: int
    number_of_expert: tuple[int, ...]

    @classmethod
    def of(cls, placement: ExpertPlacement, *, multiple: int = 1) -> "SlotNumbers":
        """Numbers the experts of a placement. E' is the most slots of a rank, rounded up to a multiple of `multiple`."""
        slots_per_rank = max(1, *(len(slots) for slots in placement.slots))
        slots_per_rank = -(-slots_per_rank // multiple) * multiple
        places = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
        return cls(slots_per_rank, tuple(rank * slots_per_rank + slot for rank, slot in places))


@dataclass(frozen=True)
class Arrival:
    """What the kernels' first dispatch returns besides the rows.

    Attributes:
        handle: Handle of the kernels, for combine and for repeated dispatches.
        weight_RY: Received weights. A repeated dispatch sends no weights.
        pair_Q: int64, index in the flattened [R, Y] of each pair computed here, in slot order.
        row_of_pair_Q, slot_counts: See `PairLayout`.
    """

    handle: Any
    weight_RY: Tensor
    pair_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]


@dataclass
class KernelPlan:
    """The plan of one layer and micro-batch. The first dispatch sets `arrived`; in HybridEP it also calls `count`."""

    layer: str
    own_rows: int = 0
    arrived: Arrival | None = None
    _sent: SentCounts | None = None

    def count(self, own: int, rows_W: list[int], pairs_W: list[int]) -> None:
        """Sets `sent` and `own_rows` from the numbers of rows and pairs for each rank; `own` is this rank's index."""
        self.own_rows = rows_W[own]
        self._sent = SentCounts(sum(rows_W) - rows_W[own], sum(pairs_W), sum(pairs_W) - pairs_W[own])

    @property
    def arrival(self) -> Arrival:
        if self.arrived is None:
            raise AssertionError("a rank's pairs are known when rows have arrived: call dispatch first")
        return self.arrived

    @property
    def sent(self) -> SentCounts:
        if self._sent is None:
            raise AssertionError("a rank's counts are known when rows have arrived: call dispatch first")
        return self._sent

    @property
    def row_of_pair_Q(self) -> Tensor:  # noqa: N802
        return self.arrival.row_of_pair_Q

    @property
    def slot_counts(self) -> tuple[int, ...]:
        return self.arrival.slot_counts


K = TypeVar("K", bound=KernelPlan)


class KernelDispatcher(TwoStepDispatcher[K]):
    """Dispatches and combines over one EP group by the kernels of a library.

    Args:
        wire: The EP group's all-to-all. Only its group, rank and statistics are used, not its exchanges.
        hidden_dim: D, the hidden size.
        multiple: The number of slots of a rank is rounded up to a multiple of this.
        buffer: The buffer of the library. If None, the first call of `plan` makes it.
    """

    LIBRARY: ClassVar[str]  # first word of the collectives' names

    def __init__(
        self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, buffer: Any = None, multiple: int = 1
    ) -> None:
        self.placement, self.wire, self.hidden_dim = placement, wire, hidden_dim
        self.numbers = SlotNumbers.of(placement, multiple=multiple)
        self.num_slots = self.numbers.slots_per_rank * placement.num_ranks
        self._buffer = buffer
        # cached on the device, because a copy per layer would be a host sync per layer
        self.number_of_expert_E = cache(lambda device: torch.tensor(self.numbers.number_of_expert, device=device))

    @property
    def buffer(self) -> Any:
        """The buffer of the library, shared by all layers."""
        if self._buffer is None:
            raise AssertionError(f"{self.LIBRARY}'s buffer is made with the first plan")
        return self._buffer

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: K) -> DispatchedRows:
        weight_TX = self.weights_of_tokens(weight_N.float(), plan)  # the kernels take fp32
        rows_RD, weight_RY = _Dispatch.apply(h_TD, weight_TX, self, plan)  # pyright: ignore[reportGeneralTypeIssues]
        weight_Q = weight_RY.reshape(-1).index_select(0, plan.arrival.pair_Q)  # the backward of an index sorts on CUDA
        return DispatchedRows(rows_RD, weight_Q.to(weight_N.dtype))

    def combine(self, rows_RD: Tensor, plan: K) -> Tensor:
        return _Combine.apply(rows_RD, self, plan)  # pyright: ignore[reportReturnType]

    @abstractmethod
    def weights_of_tokens(self, weight_N: Tensor, plan: K) -> Tensor:
        """Converts the pairs' weights to the kernels' format [T, X]. Differentiable."""

    @abstractmethod
    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: K) -> tuple[Any, ...]:
        """Calls the kernels' dispatch of rows and weights. Host sync: the kernels wait for the number of arriving rows."""

    @abstractmethod
    def settle(self, received: tuple[Any, ...], plan: K) -> Tensor:
        """Stores `received`, the result of `first_dispatch`, in the plan, and returns the received rows [R, D]."""

    @abstractmethod
    def dispatch_again(self, rows_TD: Tensor, plan: K) -> Tensor:
        """Calls the kernels' dispatch with the handle of the first dispatch, without weights."""

    @abstractmethod
    def reduce(self, rows_RD: Tensor, plan: K, weight_RY: Tensor | None) -> tuple[Tensor, Any]:
        """Calls the kernels' combine, which sums returned rows, and weights if given, for each of this rank's tokens."""

    @abstractmethod
    def weight_bytes(self, plan: K) -> int:
        """Returns the bytes of the weights and ids that are sent with one row."""

    def send(self, rows_TD: Tensor, plan: K, name: str, weight_TX: Tensor | None = None) -> Tensor:
        """Sends rows to their experts' ranks; the first dispatch, with `weight_TX`, also sends pair weights."""
        with track_collective(self.wire.tracker, f"{self.LIBRARY} {name}", device=rows_TD.device, layer=plan.layer):
            if weight_TX is None:
                rows_RD, received = self.dispatch_again(rows_TD, plan), None
            else:
                rows_RD, received = rows_TD, self.first_dispatch(rows_TD, weight_TX, plan)
        if received is not None:
            rows_RD = self.settle(received, plan)
        self._count(name, plan.sent.rows_remote, rows_TD, 0 if weight_TX is None else self.weight_bytes(plan))
        return rows_RD

    def send_back(self, rows_RD: Tensor, plan: K, name: str, weight_RY: Tensor | None = None) -> tuple[Tensor, Any]:
        """Sends rows, and weights if given, back, and returns their sums for each of this rank's tokens."""
        self._count(name, rows_RD.shape[0] - plan.own_rows, rows_RD, 0 if weight_RY is None else self.weight_bytes(plan))
        with track_collective(self.wire.tracker, f"{self.LIBRARY} {name}", device=rows_RD.device, layer=plan.layer):
            return self.reduce(rows_RD, plan, weight_RY)

    def _count(self, name: str, rows: int, like: Tensor, weight_bytes: int) -> None:
        """Counts the bytes of rows and weights sent to other ranks. It leaves out what the kernels' protocol adds."""
        comm_stats = self.wire.comm_stats
        comm_stats.count(f"{self.LIBRARY} {name}", rows * like.shape[1] * like.element_size(), payload=True)
        if weight_bytes:
            comm_stats.count(f"{self.LIBRARY} {name} weights", rows * weight_bytes, payload=False)


class _Dispatch(torch.autograd.Function):
    """Forward is the kernels' dispatch. Backward is the kernels' combine, which sums the gradients of rows and weights."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_TX: Tensor, dispatcher: KernelDispatcher[Any], plan: KernelPlan) -> Any:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        weights = None if plan.arrived else weight_TX.contiguous()
        rows_RD = dispatcher.send(h_TD.contiguous(), plan, "dispatch", weights)
        return rows_RD, plan.arrival.weight_RY.clone()  # a copy, because the plan must not join autograd's graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD, grad_RY = grads
        name, weights = "dispatch" + BACKWARD, grad_RY.float().contiguous()
        return *ctx.dispatcher.send_back(grad_RD.contiguous(), ctx.plan, name, weights), None, None


class _Combine(torch.autograd.Function):
    """Forward is the kernels' combine; backward is a dispatch with the handle of the first dispatch. The node saves no
    tensor, so `block` recompute does not repeat combine."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: KernelDispatcher[Any], plan: KernelPlan) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher.send_back(rows_RD.contiguous(), plan, "combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.send(grads[0].contiguous(), ctx.plan, "combine" + BACKWARD), None, None
