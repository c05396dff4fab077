"""Dispatches and combines by DeepEP's kernels for NVLink and RDMA (`deep_ep.ElasticBuffer`, API of V2); see `kernels`.

DeepEP takes K weights and K expert ids for each token. An expert's id is its number in `SlotNumbers`. The id -1 means no
expert, and is also the id of a null choice. So a token whose choices are all null is sent to no rank. The dispatcher uses
DeepEP's expanded layout, which has one row for each pair, sorted by expert, without padding. In this layout, the order of
an expert's rows may differ between executions. A deterministic buffer avoids this by one more sort.

The memory contains Q rows, the output y and DeepEP's buffer. The first plan makes a buffer for its number of tokens. A
later plan with more tokens makes a larger buffer. Making a buffer is a collective, so all ranks of an EP group need the
same number of tokens.

Shape letters are as in `kernels`. K is the number of choices per token, so N = T K.
"""

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.kernels import Arrival, KernelDispatcher, KernelPlan, require_card
from moe_dist.moe.routing.types import ABSENT, Assignments

_WEIGHT_BYTES = 4  # bytes of an fp32 weight


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


@dataclass(kw_only=True)
class DeepEPPlan(KernelPlan):
    """The plan of one layer and micro-batch, with DeepEP's expert ids. The id -1 means no expert."""

    topk_idx_TK: Tensor


class DeepEPDispatcher(KernelDispatcher[DeepEPPlan]):
    """Dispatches and combines by a `deep_ep.ElasticBuffer`. `top_k` is K, by default the largest top_k of all groups. A
    token of a group with fewer choices has absent pairs."""

    LIBRARY = "DeepEP"

    def __init__(self, context: DispatchContext, *, top_k: int | None = None) -> None:
        super().__init__(context)
        self.top_k = top_k or max(group.top_k for group in context.placement.groups)
        self.deterministic = context.deterministic

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DeepEPPlan:
        """Computes DeepEP's ids without a host sync. The first plan also makes DeepEP's buffer, by a collective call.
        Raises ConfigError if `topk_idx_of` or `require_card` does."""
        deep_ep = import_module("deep_ep")  # preflight has checked that deep_ep is installed
        if self.buffer is None or num_tokens > self.buffer.num_max_tokens_per_rank:
            require_card("DeepEP")
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
        topk_idx_TK = topk_idx_TK.to(deep_ep.topk_idx_t)  # DeepEP may be built for 32-bit expert ids
        return DeepEPPlan(layer=layer, rank=self.wire.rank, counts=self.counts(pairs_TW), topk_idx_TK=topk_idx_TK)

    def weights_of_tokens(self, weight_N: Tensor, plan: DeepEPPlan) -> Tensor:
        return weight_N.view(plan.topk_idx_TK.shape)

    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: DeepEPPlan) -> tuple[Tensor, Arrival]:
        rows_QD, _, weight_Q, handle, _ = self.buffer.dispatch(
            h_TD, topk_idx=plan.topk_idx_TK, topk_weights=weight_TX, num_experts=self.num_slots, do_expand=True
        )
        counts = self.own_counts(handle.num_recv_tokens_per_expert_list)
        return rows_QD, Arrival(handle, weight_Q, handle.num_recv_tokens, counts)

    def dispatch_again(self, rows_TD: Tensor, plan: DeepEPPlan) -> Tensor:
        handle = plan.arrival.handle  # the handle has the counts, so nothing syncs here

        # Repeats the first dispatch's layout and number of SMs, because DeepEP does not read these two from the handle.
        return self.buffer.dispatch(rows_TD, handle=handle, num_sms=handle.num_sms, do_expand=True)[0]

    def reduce(self, rows_QD: Tensor, plan: DeepEPPlan, weight_Q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.buffer.combine(rows_QD, plan.arrival.handle, topk_weights=weight_Q)[:2]

    def weight_bytes(self, plan: DeepEPPlan) -> int:
        return self.top_k * (plan.topk_idx_TK.element_size() + _WEIGHT_BYTES)
