"""Dispatches and combines by DeepEP's kernels for NVLink and RDMA (`deep_ep.ElasticBuffer`, API of V2).

As in `all_to_all`, one row is sent per (token, destination rank), and null choices send no row. The kernels copy an arrived
row for each of its pairs, and sort the pairs by slot. So the experts neither gather nor sum rows. The kernels' combine sums
the weighted outputs of a token's experts, first on each experts' rank, then over ranks. Four things differ from
`all_to_all`. Each pair's output is rounded to bf16 before it is summed. Rows that stay on their rank also pass through the
kernels' buffer. Rows must be bf16, and weights fp32. The kernels allocate the receive buffer, so `max_receive_rows` cannot
be checked before the allocation. The first dispatch returns a handle: DeepEP's record of the routes of all rows. The
kernels need the handle in combine, backward and recomputation.

A layer has one host sync: the first dispatch waits until the host knows how many rows arrive. At this time the host also
has the counts for the traffic ledger (module `ledger`).

DeepEP takes K weights and K expert ids for each token. An expert's id is its number in `SlotNumbers`. The id -1 means no
expert, and is also the id of a null choice. So a token whose choices are all null is sent to no rank. The dispatcher uses
DeepEP's expanded layout, which has one row for each pair, sorted by expert, without padding. In this layout, the order of
an expert's rows may differ between executions. A deterministic buffer avoids this by one more sort.

The memory contains Q rows, the output y and DeepEP's buffer. The first plan makes a buffer for its number of tokens. A
later plan with more tokens makes a larger buffer. Making a buffer is a collective, so all ranks of an EP group need the
same number of tokens.

Shape letters: T tokens on this rank, D hidden size, W ranks, K choices of a token, N = T K (token, expert) pairs (absent
pairs included), Q pairs computed here, sorted by slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.names import BACKWARD
from moe_dist.comm.tracker import track_collective
from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.interface import DispatchedRows, TwoStepDispatcher
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

OLDEST_CARD = (9, 0)  # lowest compute capability for DeepEP's kernels, because these use TMA
_WEIGHT_BYTES = 4  # bytes of an fp32 weight


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
    def of(cls, placement: ExpertPlacement) -> "SlotNumbers":
        """Numbers the experts of a placement. E' is a rank's largest number of slots."""
        slots_per_rank = max(1, *(len(slots) for slots in placement.slots))
        places = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
        return cls(slots_per_rank, tuple(rank * slots_per_rank + slot for rank, slot in places))


def require_card() -> None:
    """Raises a ConfigError if DeepEP's kernels do not run on this rank's GPU."""
    found = torch.cuda.get_device_capability()
    if found < OLDEST_CARD:
        raise ConfigError(
            f"parallel.dispatch.kind: DeepEP needs compute capability {'.'.join(map(str, OLDEST_CARD))} (Hopper) or "
            f"newer, but {torch.cuda.get_device_name()} has {'.'.join(map(str, found))}; set "
            "parallel.dispatch.kind=all_to_all"
        )


@dataclass(frozen=True)
class Arrival:
    """The values that the kernels' first dispatch returns besides the rows.

    Attributes:
        handle: DeepEP's record of the rows' routes, which combine and repeated dispatches need.
        weight_Q: The received weights. Repeated dispatches send no weights.
        num_rows: Number of arrived rows: one for each token that has an expert on this rank.
    """

    handle: Any
    weight_Q: Tensor
    num_rows: int
    slot_counts: tuple[int, ...]


@dataclass(kw_only=True)
class DeepEPPlan:
    """The plan of one layer and micro-batch, with DeepEP's expert ids. The id -1 means no expert. The first dispatch sets
    `arrived`. `counts` returns 2 W integers: the numbers of rows to each rank, then the numbers of pairs to each rank."""

    layer: str
    rank: int
    counts: Callable[[], list[int]]
    topk_idx_TK: Tensor
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


def topk_idx_of(assignments: Assignments, num_tokens: int, top_k: int, number_of_expert_E: Tensor) -> Tensor:
    """Returns DeepEP's `topk_idx`, int64 [T, K], from assignments sorted by token; -1 means no expert. Raises ConfigError
    if there are not T x K pairs, because tokens then do not choose experts."""
    if assignments.expert_N.shape[0] != num_tokens * top_k:
        raise ConfigError(
            f"parallel.dispatch.kind=deep_ep_v2 takes {top_k} choices of each of {num_tokens} tokens, and got "
            f"{assignments.expert_N.shape[0]} pairs; a router whose experts choose tokens needs "
            "parallel.dispatch.kind=all_to_all"
        )
    token_N = torch.arange(num_tokens, device=assignments.token_N.device).repeat_interleave(top_k)  # the order DeepEP needs

    # asserted on the device, because a check on the host would sync
    in_order = (assignments.token_N == token_N).all()
    torch._assert_async(in_order, "deep_ep_v2: pairs are not in the order of tokens")  # pyright: ignore[reportPrivateImportUsage]
    number_N = number_of_expert_E[assignments.expert_N.clamp_min(0)]
    return torch.where(assignments.expert_N == ABSENT, -1, number_N).view(num_tokens, top_k)


class DeepEPDispatcher(TwoStepDispatcher[DeepEPPlan]):
    """Dispatches and combines by a `deep_ep.ElasticBuffer` over one EP group. Uses the process group, rank and statistics
    of its all-to-all, but not its exchanges. `top_k` is K, by default the largest top_k of all groups. A token of a group
    with fewer choices has absent pairs."""

    def __init__(self, context: DispatchContext, *, top_k: int | None = None) -> None:
        self.placement, self.wire, self.hidden_dim = context.placement, context.all_to_all, context.hidden_dim
        self.top_k = top_k or max(group.top_k for group in context.placement.groups)
        self.deterministic = context.deterministic
        self.numbers = SlotNumbers.of(self.placement)
        self.num_slots = self.numbers.slots_per_rank * self.placement.num_ranks
        self.buffer: Any = None  # DeepEP's buffer for all layers, made by the first plan

        # cached on the device, because one copy per layer would cost one host sync per layer
        self.number_of_expert_E = cache(lambda device: torch.tensor(self.numbers.number_of_expert, device=device))

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DeepEPPlan:
        """Computes DeepEP's ids without a host sync. The first plan also makes DeepEP's buffer, by a collective call.
        Raises ConfigError if `topk_idx_of` or `require_card` does."""
        deep_ep = import_module("deep_ep")  # preflight has checked that deep_ep is installed
        if self.buffer is None or num_tokens > self.buffer.num_max_tokens_per_rank:
            require_card()
            self.buffer = deep_ep.ElasticBuffer(
                self.wire.group,
                num_max_tokens_per_rank=num_tokens,
                hidden=self.hidden_dim,
                num_topk=self.top_k,
                deterministic=self.deterministic,
            )
        device = assignments.expert_N.device
        topk_idx_TK = topk_idx_of(assignments, num_tokens, self.top_k, self.number_of_expert_E(device))
        rank_TK = topk_idx_TK.div(self.numbers.slots_per_rank, rounding_mode="floor")  # -1 stays -1
        pairs_TW = (rank_TK[..., None] == torch.arange(self.placement.num_ranks, device=device)).sum(1)
        counts = self.wire.comm_stats.start_to_host(torch.cat([(pairs_TW > 0).sum(0), pairs_TW.sum(0)]))  # does not sync
        topk_idx_TK = topk_idx_TK.to(deep_ep.topk_idx_t)  # DeepEP may be built for 32-bit expert ids
        return DeepEPPlan(layer=layer, rank=self.wire.rank, counts=counts, topk_idx_TK=topk_idx_TK)

    def dispatch(self, h_TD: Tensor, weight_N: Tensor, plan: DeepEPPlan) -> DispatchedRows:
        weight_TK = weight_N.float().view(plan.topk_idx_TK.shape)  # the kernels take fp32
        rows_QD, weight_Q = _Dispatch.apply(h_TD, weight_TK, self, plan)  # pyright: ignore[reportGeneralTypeIssues]
        return DispatchedRows(rows_QD, weight_Q.to(weight_N.dtype), sorted_pairs=True)

    def combine(self, rows_RD: Tensor, plan: DeepEPPlan) -> Tensor:
        return _Combine.apply(rows_RD, self, plan)  # pyright: ignore[reportReturnType]

    def send(self, rows_TD: Tensor, plan: DeepEPPlan, name: str, weight_TK: Tensor | None = None) -> Tensor:
        """Sends rows to the ranks of their experts. Returns the pairs' rows [Q, D]. The first dispatch has `weight_TK`, and
        also sends the pair weights. It syncs, because the host waits for the number of arriving rows."""
        with track_collective(self.wire.tracker, f"DeepEP {name}", device=rows_TD.device, layer=plan.layer):
            if weight_TK is None:
                handle = plan.arrival.handle  # the handle has the counts, so nothing syncs here
                # Repeats the first dispatch's layout and number of SMs, which DeepEP does not read from the handle.
                rows_QD = self.buffer.dispatch(rows_TD, handle=handle, num_sms=handle.num_sms, do_expand=True)[0]
            else:
                self.wire.comm_stats.event("sync DeepEP counts")
                rows_QD, _, weight_Q, handle, _ = self.buffer.dispatch(
                    rows_TD, topk_idx=plan.topk_idx_TK, topk_weights=weight_TK, num_experts=self.num_slots, do_expand=True
                )
                counts = handle.num_recv_tokens_per_expert_list[: len(self.placement.slots[self.wire.rank])]
                plan.arrive(Arrival(handle, weight_Q, handle.num_recv_tokens, tuple(counts)))
        self._count(name, plan.sent.rows_remote, rows_TD, plan, weights=weight_TK is not None)
        return rows_QD

    def send_back(
        self, rows_QD: Tensor, plan: DeepEPPlan, name: str, weight_Q: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sends rows (and weights, if given) back. Returns the sums for each of this rank's tokens, and the weights as
        [T, K]."""
        self._count(name, plan.arrival.num_rows - plan.own_rows, rows_QD, plan, weights=weight_Q is not None)
        with track_collective(self.wire.tracker, f"DeepEP {name}", device=rows_QD.device, layer=plan.layer):
            return self.buffer.combine(rows_QD, plan.arrival.handle, topk_weights=weight_Q)[:2]

    def _count(self, name: str, rows: int, like: Tensor, plan: DeepEPPlan, *, weights: bool) -> None:
        """Counts the bytes of rows, and of weights and ids, sent to other ranks, without those of the kernels' protocol."""
        comm_stats = self.wire.comm_stats
        comm_stats.count(f"DeepEP {name}", rows * like.shape[1] * like.element_size(), payload=True)
        if weights:
            weight_bytes = self.top_k * (plan.topk_idx_TK.element_size() + _WEIGHT_BYTES)
            comm_stats.count(f"DeepEP {name} weights", rows * weight_bytes, payload=False)


class _Dispatch(torch.autograd.Function):
    """Forward is the kernels' dispatch. Backward is the kernels' combine, which sums the gradients of rows and weights."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_TK: Tensor, dispatcher: DeepEPDispatcher, plan: DeepEPPlan) -> Any:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        weights = None if plan.arrived else weight_TK.contiguous()
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
    def forward(ctx: Any, rows_QD: Tensor, dispatcher: DeepEPDispatcher, plan: DeepEPPlan) -> Tensor:
        ctx.dispatcher, ctx.plan = dispatcher, plan
        return dispatcher.send_back(rows_QD.contiguous(), plan, "combine")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.send(grads[0].contiguous(), ctx.plan, "combine" + BACKWARD), None, None
