"""Defines the base class of the two dispatchers that call the kernels of the libraries DeepEP and HybridEP.

As in `all_to_all`, one row is sent per (token, destination rank), and null choices send no row. The kernels copy an arrived
row for each of its pairs, and sort the pairs by slot. So the experts neither gather nor sum rows. The kernels' combine sums
the weighted outputs of a token's experts, first on each experts' rank, then over ranks. Four things differ from
`all_to_all`. Each pair's output is rounded to bf16 before it is summed. Rows that stay on their rank also pass through the
kernels' buffer. Rows must be bf16, and weights fp32. The kernels allocate the receive buffer, so `max_receive_rows` cannot
be checked before the allocation. The first dispatch returns a handle: the library's record of the routes of all rows. The
kernels need the handle in combine, backward and recomputation.

A layer has one host sync: the first dispatch waits until the host knows how many rows arrive. At this time the host also
has the counts for the traffic ledger (module `ledger`).

A subclass converts assignments and weights to the format of its library, and calls the library's buffer in
`first_dispatch`, `dispatch_again` and `reduce`. Shape letters: T tokens on this rank, D hidden size, W ranks, N (token,
expert) pairs (absent pairs included), Q pairs computed here, sorted by slot, X weights sent per token.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.names import BACKWARD
from moe_dist.comm.tracker import track_collective
from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.placement.placement import ExpertPlacement

OLDEST_CARD = (9, 0)  # lowest compute capability for the kernels of both libraries, because these use TMA


@dataclass(frozen=True)
class SlotNumbers:
    """Numbers the experts for the kernels, which need E' slots on every rank. Slot s of rank r has the number r E' + s.

    Attributes:
        slots_per_rank: E', at least 1, because the kernels divide by E'.
        number_of_expert: Slot number of each logical expert. A slot without an expert gets no token.
    """

    slots_per_rank: int
    number_of_expert: tuple[int, ...]

    @classmethod
    def of(cls, placement: ExpertPlacement, *, multiple: int = 1) -> "SlotNumbers":
        """Numbers the experts of a placement. E' is a rank's largest number of slots, rounded up to a multiple of
        `multiple`."""
        slots_per_rank = max(1, *(len(slots) for slots in placement.slots))
        slots_per_rank = -(-slots_per_rank // multiple) * multiple
        places = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
        return cls(slots_per_rank, tuple(rank * slots_per_rank + slot for rank, slot in places))


def require_card(library: str) -> None:
    """Raises a ConfigError if the kernels of `library` do not run on this rank's GPU."""
    found = torch.cuda.get_device_capability()
    if found < OLDEST_CARD:
        raise ConfigError(
            f"parallel.dispatch.kind: {library} needs compute capability {'.'.join(map(str, OLDEST_CARD))} (Hopper) or "
            f"newer, but {torch.cuda.get_device_name()} has {'.'.join(map(str, found))}; set "
            "parallel.dispatch.kind=all_to_all"
        )


@dataclass(frozen=True)
class Arrival:
    """The values that the kernels' first dispatch returns besides the rows.

    Attributes:
        handle: The library's record of the rows' routes, which combine and repeated dispatches need.
        weight_Q: The received weights. Repeated dispatches send no weights.
        num_rows: Number of arrived rows: one for each token that has an expert on this rank.
    """

    handle: Any
    weight_Q: Tensor
    num_rows: int
    slot_counts: tuple[int, ...]


@dataclass(kw_only=True)
class KernelPlan:
    """The plan of one layer and micro-batch. The first dispatch sets `arrived`. `counts` returns 2 W integers: the numbers
    of rows to each rank, then the numbers of pairs to each rank."""

    layer: str
    rank: int
    counts: Callable[[], list[int]]
    arrived: Arrival | None = None
    _rows_pairs: tuple[list[int], list[int]] | None = None

    @property
    def arrival(self) -> Arrival:
        if self.arrived is None:
            raise AssertionError("a rank's pairs are known when rows have arrived: call dispatch first")
        return self.arrived

    def arrive(self, arrived: Arrival) -> None:
        """Keeps the result of the first dispatch, and reads the counts, which are already on the host."""
        self.arrived, found = arrived, self.counts()
        self._rows_pairs = found[: len(found) // 2], found[len(found) // 2 :]

    @property
    def own_rows(self) -> int:
        assert self._rows_pairs is not None
        return self._rows_pairs[0][self.rank]

    @property
    def sent(self) -> SentCounts:
        if self._rows_pairs is None:
            raise AssertionError("a rank's counts are known when rows have arrived: call dispatch first")
        rows_W, pairs_W = self._rows_pairs
        return SentCounts(sum(rows_W) - rows_W[self.rank], sum(pairs_W), sum(pairs_W) - pairs_W[self.rank])

    @property
    def row_of_pair_Q(self) -> Tensor:  # noqa: N802
        weight_Q = self.arrival.weight_Q
        return torch.arange(weight_Q.shape[0], device=weight_Q.device)

    @property
    def slot_counts(self) -> tuple[int, ...]:
        return self.arrival.slot_counts


K = TypeVar("K", bound=KernelPlan)


class KernelDispatcher(TwoStepDispatcher[K]):
    """Dispatches and combines over one EP group by the kernels of a library. It uses the process group, rank and statistics
    of the EP group's all-to-all, but not its exchanges. The number of slots of a rank is rounded up to a multiple of
    `multiple`."""

    LIBRARY: ClassVar[str]  # first word of the collectives' names

    def __init__(self, context: DispatchContext, *, multiple: int = 1) -> None:
        self.placement, self.wire, self.hidden_dim = context.placement, context.all_to_all, context.hidden_dim
        self.numbers = SlotNumbers.of(self.placement, multiple=multiple)
        self.num_slots = self.numbers.slots_per_rank * self.placement.num_ranks
        self.buffer: Any = None  # the library's buffer for all layers, made by the first plan

        # cached on the device, because one copy per layer would cost one host sync per layer
        self.number_of_expert_E = cache(lambda device: torch.tensor(self.numbers.number_of_expert, device=device))

    def counts(self, pairs_TW: Tensor) -> Callable[[], list[int]]:
        """Returns `KernelPlan.counts`, from the number of each token's pairs on each rank. Does not sync."""
        return self.wire.comm_stats.start_to_host(torch.cat([(pairs_TW > 0).sum(0), pairs_TW.sum(0)]))

    def own_counts(self, counts: list[int]) -> tuple[int, ...]:
        """Returns the numbers of pairs of this rank's experts, without the slots that have no expert."""
        return tuple(counts[: len(self.placement.slots[self.wire.rank])])

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: K) -> DispatchedRows:
        weight_TX = self.weights_of_tokens(weight_N.float(), plan)  # the kernels take fp32
        rows_QD, weight_Q = _Dispatch.apply(h_TD, weight_TX, self, plan)  # pyright: ignore[reportGeneralTypeIssues]
        return DispatchedRows(rows_QD, weight_Q.to(weight_N.dtype), sorted_pairs=True)

    def combine(self, rows_RD: Tensor, plan: K) -> Tensor:
        return _Combine.apply(rows_RD, self, plan)  # pyright: ignore[reportReturnType]

    @abstractmethod
    def weights_of_tokens(self, weight_N: Tensor, plan: K) -> Tensor:
        """Converts the pairs' weights to the kernels' format [T, X]. Differentiable."""

    @abstractmethod
    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: K) -> tuple[Tensor, Arrival]:
        """Calls the kernels' dispatch of rows and weights. Returns the pairs' rows [Q, D] and an `Arrival`. Syncs, because
        the host waits for the number of arriving rows."""

    @abstractmethod
    def dispatch_again(self, rows_TD: Tensor, plan: K) -> Tensor:
        """Calls the kernels' dispatch of rows without weights, with the handle of the first dispatch."""

    @abstractmethod
    def reduce(self, rows_QD: Tensor, plan: K, weight_Q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Calls the kernels' combine, which sums each token's returned rows. Also returns any given weights, as [T, X]."""

    @abstractmethod
    def weight_bytes(self, plan: K) -> int:
        """Returns the number of bytes of the weights and ids that are sent with one row."""

    def send(self, rows_TD: Tensor, plan: K, name: str, weight_TX: Tensor | None = None) -> Tensor:
        """Sends rows to the ranks of their experts. The first dispatch has `weight_TX`, and also sends the pair weights."""
        with track_collective(self.wire.tracker, f"{self.LIBRARY} {name}", device=rows_TD.device, layer=plan.layer):
            if weight_TX is None:
                rows_QD = self.dispatch_again(rows_TD, plan)
            else:
                self.wire.comm_stats.event(f"sync {self.LIBRARY} counts")
                rows_QD, arrived = self.first_dispatch(rows_TD, weight_TX, plan)
                plan.arrive(arrived)
        self._count(name, plan.sent.rows_remote, rows_TD, 0 if weight_TX is None else self.weight_bytes(plan))
        return rows_QD

    def send_back(
        self, rows_QD: Tensor, plan: K, name: str, weight_Q: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sends rows (and weights, if given) back. Returns the sums for each of this rank's tokens."""
        rows = plan.arrival.num_rows - plan.own_rows
        self._count(name, rows, rows_QD, 0 if weight_Q is None else self.weight_bytes(plan))
        with track_collective(self.wire.tracker, f"{self.LIBRARY} {name}", device=rows_QD.device, layer=plan.layer):
            return self.reduce(rows_QD, plan, weight_Q)

    def _count(self, name: str, rows: int, like: Tensor, weight_bytes: int) -> None:
        """Counts the bytes of rows and weights sent to other ranks, without the bytes of the kernels' protocol."""
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
        rows_QD = dispatcher.send(h_TD.contiguous(), plan, "dispatch", weights)
        return rows_QD, plan.arrival.weight_Q.clone()  # a copy, so that autograd's graph does not contain the plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_QD, grad_Q = grads
        name, weights = "dispatch" + BACKWARD, grad_Q.float().contiguous()
        return *ctx.dispatcher.send_back(grad_QD.contiguous(), ctx.plan, name, weights), None, None


class _Combine(torch.autograd.Function):
    """Forward is the kernels' combine. Backward sends the gradients along the routes of the first dispatch, which
    `Arrival.handle` records. The node saves no tensor, so `recompute="block"` does not repeat combine."""

    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, dispatcher: KernelDispatcher[Any], plan: KernelPlan) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher.send_back(rows_QD.contiguous(), plan, "combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.send(grads[0].contiguous(), ctx.plan, "combine" + BACKWARD), None, None
