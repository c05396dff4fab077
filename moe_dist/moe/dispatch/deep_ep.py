"""Dispatch and combine by DeepEP's kernels (`deep_ep.Buffer`, API of V1), for NVLink and RDMA.

DeepEP takes for each token a row of K expert ids, -1 for no selection, and weights beside them. It knows nothing of logical
experts: its ids are the numbers of `slot_numbers`, as many on every rank. A null choice is -1, and a token of null choices
alone goes nowhere.

Contract and results are those of `all_to_all`: one row for each (token, destination rank), weighted and summed there, and
DeepEP's combine adds the ranks' rows without weights. What differs: rows for the own rank pass through DeepEP's buffer too;
rows are bf16 and weights fp32; the receive buffer is DeepEP's, so that `max_receive_rows` cannot be checked before it.

Host syncs: two a layer. DeepEP's dispatch waits on the host for the number of rows that arrive; and `plan` reads its
layout, for the ledger. Memory: R rows and y, and DeepEP's own buffer.

Shape letters: T tokens on this rank, D hidden size, K choices a token, N = T K pairs, R rows here (by source rank, then by
token), Q pairs computed here.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.tracker import track_collective
from moe_dist.errors import PlacementError
from moe_dist.moe.dispatch.counting import counting_order
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.dispatch.slot_numbers import SlotNumbers
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

LAYOUT = "DeepEP layout for the ledger"  # the adaptor's host sync, as Traffic records it
_PAIR_BYTES = 12  # of an int64 id and an fp32 weight


class Buffer(Protocol):
    """What is used of `deep_ep.Buffer`."""

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Any]: ...
    def dispatch(self, x: Tensor, **kwargs: Any) -> tuple[Any, ...]: ...
    def combine(self, x: Tensor, handle: Any, **kwargs: Any) -> tuple[Any, ...]: ...


def topk_idx_of(assignments: Assignments, num_tokens: int, top_k: int, number_of_expert_E: Tensor) -> Tensor:
    """DeepEP's `topk_idx` [T, K], int64, -1 for no selection, from token-major assignments.

    Raises:
        PlacementError: not T x K pairs: the assignments are not token choice.
    """
    if assignments.expert_N.shape[0] != num_tokens * top_k:
        raise PlacementError(
            f"parallel.dispatch.kind=deep_ep takes {top_k} choices of each of {num_tokens} tokens, and got "
            f"{assignments.expert_N.shape[0]} pairs; a router whose experts choose tokens needs "
            "parallel.dispatch.kind=all_to_all"
        )
    token_N = torch.arange(num_tokens, device=assignments.token_N.device).repeat_interleave(top_k)
    # Checked on the device: no sync, one comparison of N numbers.
    in_order = (assignments.token_N == token_N).all()
    torch._assert_async(in_order, "deep_ep: pairs are not in the order of tokens")  # pyright: ignore[reportPrivateImportUsage]
    number_N = number_of_expert_E[assignments.expert_N.clamp_min(0)]
    return torch.where(assignments.expert_N == ABSENT, -1, number_N).view(num_tokens, top_k)


def make_buffer(group: Any, hidden_dim: int) -> Buffer:
    """A `deep_ep.Buffer` for bf16 rows of `hidden_dim`, as large as its own hints say; one serves all layers.

    Imports deep_ep, which preflight has seen to be installed. Collective; DeepEP exchanges its handles as Python objects.
    """
    deep_ep = import_module("deep_ep")
    size, row_bytes = group.size(), hidden_dim * 2
    configs = (deep_ep.Buffer.get_dispatch_config(size), deep_ep.Buffer.get_combine_config(size))
    return deep_ep.Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs),
    )


@dataclass
class _Arrival:
    """What DeepEP says when rows arrive: known after the first dispatch, and used again by combine and by recompute.

    Attributes:
        handle: DeepEP's own; what combine and repeated dispatches take.
        weight_RK: Received weights, as they were; a dispatch by handle carries none.
        pair_Q: int64, places in [R, K] of the pairs computed here, in slot order.
        row_of_pair_Q, slot_counts: As in every plan.
    """

    handle: Any
    weight_RK: Tensor
    pair_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]


@dataclass(frozen=True)
class DeepEPPlan:
    """Who goes where, for one layer and micro-batch, without gradient; what DeepEP decides arrives with the first dispatch.

    Attributes:
        layer: Name of the layer.
        topk_idx_TK: DeepEP's ids, int64, -1 for no selection.
        layout: Of `get_dispatch_layout`: tokens to each rank, to each RDMA rank, to each expert, whether a token goes to
            a rank.
        own_rows: Rows of this rank's tokens to itself.
        num_remote_rows, num_pairs, num_remote_pairs: As in every plan.
    """

    layer: str
    topk_idx_TK: Tensor
    layout: tuple[Tensor, Tensor | None, Tensor, Tensor]
    own_rows: int
    num_remote_rows: int
    num_pairs: int
    num_remote_pairs: int
    _arrived: list[_Arrival] = field(default_factory=list, repr=False)

    @property
    def arrived(self) -> bool:
        """Whether it has been dispatched."""
        return bool(self._arrived)

    def arrive(self, arrival: _Arrival) -> None:
        """Settles the plan, once."""
        self._arrived.append(arrival)

    @property
    def arrival(self) -> _Arrival:
        if not self._arrived:
            raise AssertionError("DeepEP tells what a rank computes when rows arrive: call dispatch first")
        return self._arrived[0]

    @property
    def row_of_pair_Q(self) -> Tensor:  # noqa: N802
        return self.arrival.row_of_pair_Q

    @property
    def slot_counts(self) -> tuple[int, ...]:
        return self.arrival.slot_counts


class DeepEPDispatcher:
    """Dispatch and combine over one EP group by a `deep_ep.Buffer`.

    Args:
        placement: Which expert lives on which rank of the EP group.
        wire: The EP group's wire: for its group, rank and traffic; nothing is sent over it.
        hidden_dim: D.
        top_k: K, the choices of each token in the assignments.
        buffer: DeepEP's; made at the first plan if None.
    """

    def __init__(
        self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, top_k: int, buffer: Buffer | None = None
    ) -> None:
        self.placement = placement
        self.wire = wire
        self.hidden_dim = hidden_dim
        self.top_k = top_k
        self.numbers = SlotNumbers.of(placement)
        self.num_experts = self.numbers.slots_per_rank * placement.num_ranks
        self._buffer = buffer
        self._number_of_expert: dict[torch.device, Tensor] = {}

    @property
    def buffer(self) -> Buffer:
        if self._buffer is None:
            self._buffer = make_buffer(self.wire.group, self.hidden_dim)
        return self._buffer

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DeepEPPlan:
        """DeepEP's ids and its layout. Syncs with the host for the ledger's counts.

        Raises:
            PlacementError: the assignments are not token choice.
        """
        device = assignments.expert_N.device
        if device not in self._number_of_expert:
            self._number_of_expert[device] = torch.tensor(self.numbers.number_of_expert, device=device)
        topk_idx_TK = topk_idx_of(assignments, num_tokens, self.top_k, self._number_of_expert[device])
        rows_W, rdma_rows, pairs_E, in_rank_TW, _ = self.buffer.get_dispatch_layout(topk_idx_TK, self.num_experts)
        counts = self.wire.comm_stats.to_host(LAYOUT, torch.cat([rows_W, pairs_E]))
        size, own, slots = self.placement.num_ranks, self.wire.rank, self.numbers.slots_per_rank
        rows, pairs = counts[:size], counts[size:]
        return DeepEPPlan(
            layer=layer,
            topk_idx_TK=topk_idx_TK,
            layout=(rows_W, rdma_rows, pairs_E, in_rank_TW),
            own_rows=rows[own],
            num_remote_rows=sum(rows) - rows[own],
            num_pairs=sum(pairs),
            num_remote_pairs=sum(pairs) - sum(pairs[own * slots : (own + 1) * slots]),
        )

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: DeepEPPlan) -> DispatchedRows:
        """Rows [R, D], those of this rank's tokens among them in the order of source ranks, and the pairs' weights."""
        weight_TK = weight_N.float().view(plan.topk_idx_TK.shape)
        rows_RD, weight_RK = _Dispatch.apply(h_TD, weight_TK, self, plan)  # pyright: ignore[reportGeneralTypeIssues]
        return DispatchedRows(rows_RD=rows_RD, weight_Q=weight_RK.reshape(-1)[plan.arrival.pair_Q].to(weight_N.dtype))

    def combine(self, rows_RD: Tensor, plan: DeepEPPlan) -> Tensor:
        """Sums the rows [R, D] of all ranks at home: y_TD, zero for tokens without an expert. One autograd node."""
        return _Combine.apply(rows_RD, self, plan)  # pyright: ignore[reportReturnType]

    def send(self, rows_TD: Tensor, plan: DeepEPPlan, *, name: str) -> Tensor:
        """The exchange of rows by the handle of a plan that has been dispatched; carries no weights."""
        self._count(name, plan.num_remote_rows, rows_TD, with_pairs=False)
        with track_collective(self.wire.tracker, f"DeepEP {name}", device=rows_TD.device, layer=plan.layer):
            return self.buffer.dispatch(rows_TD, handle=plan.arrival.handle)[0]

    def send_first(self, h_TD: Tensor, weight_TK: Tensor, plan: DeepEPPlan) -> Tensor:
        """The exchange of rows and weights that settles the plan. DeepEP waits on the host for the number of rows."""
        self._count("dispatch", plan.num_remote_rows, h_TD, with_pairs=True)
        rows_W, rdma_rows, pairs_E, in_rank_TW = plan.layout
        with track_collective(self.wire.tracker, "DeepEP dispatch", device=h_TD.device, layer=plan.layer):
            rows_RD, idx_RK, weight_RK, counts, handle, _ = self.buffer.dispatch(
                h_TD,
                topk_idx=plan.topk_idx_TK,
                topk_weights=weight_TK,
                num_tokens_per_rank=rows_W,
                num_tokens_per_rdma_rank=rdma_rows,
                is_token_in_rank=in_rank_TW,
                num_tokens_per_expert=pairs_E,
            )
        num_slots = len(self.placement.slots[self.wire.rank])
        slot_N = torch.where(idx_RK < 0, self.numbers.slots_per_rank, idx_RK).reshape(-1)
        pair_Q = counting_order(slot_N, self.numbers.slots_per_rank + 1)[: sum(counts)]
        plan.arrive(_Arrival(handle, weight_RK, pair_Q, pair_Q // self.top_k, slot_counts=tuple(counts[:num_slots])))
        return rows_RD

    def send_back(self, rows_RD: Tensor, plan: DeepEPPlan, *, name: str, weight_RK: Tensor | None = None) -> Any:
        """The reduction of rows, and of weights where they are given, into this rank's tokens."""
        self._count(name, rows_RD.shape[0] - plan.own_rows, rows_RD, with_pairs=weight_RK is not None)
        with track_collective(self.wire.tracker, f"DeepEP {name}", device=rows_RD.device, layer=plan.layer):
            return self.buffer.combine(rows_RD, plan.arrival.handle, topk_weights=weight_RK)[:2]

    def _count(self, name: str, rows: int, like: Tensor, *, with_pairs: bool) -> None:
        """What is handed to DeepEP for other ranks; what its protocol adds is not known here."""
        comm_stats = self.wire.comm_stats
        comm_stats.count(f"DeepEP {name}", rows * like.shape[1] * like.element_size(), payload=True)
        if with_pairs:
            comm_stats.count(f"DeepEP {name} weights", rows * self.top_k * _PAIR_BYTES, payload=False)


class _Dispatch(torch.autograd.Function):
    """Dispatch, and as its backward DeepEP's combine, which adds rows and weights without weights."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_TK: Tensor, dispatcher: DeepEPDispatcher, plan: DeepEPPlan) -> Any:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        h_TD = h_TD.contiguous()
        if plan.arrived:
            rows_RD = dispatcher.send(h_TD, plan, name="dispatch")
        else:
            rows_RD = dispatcher.send_first(h_TD, weight_TK.contiguous(), plan)
        return rows_RD, plan.arrival.weight_RK.clone()  # the plan keeps its own: an output gets a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD, grad_RK = grads
        grad_TD, grad_TK = ctx.dispatcher.send_back(
            grad_RD.contiguous(), ctx.plan, name="dispatch backward", weight_RK=grad_RK.float().contiguous()
        )
        return grad_TD, grad_TK, None, None


class _Combine(torch.autograd.Function):
    """Combine, and as its backward a dispatch by the same handle. Saves no tensor: `block` recompute does not repeat it."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: DeepEPDispatcher, plan: DeepEPPlan) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher.send_back(rows_RD.contiguous(), plan, name="combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.send(grads[0].contiguous(), ctx.plan, name="combine backward"), None, None
