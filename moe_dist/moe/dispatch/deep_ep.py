"""Dispatch and combine by DeepEP's kernels (`deep_ep.Buffer`, API of V1), for NVLink and RDMA; see `kernels`.

DeepEP takes for each token a row of K expert ids, -1 for no selection, and weights beside them. It knows nothing of logical
experts: its ids are `SlotNumbers`. A null choice is -1, and a token of null choices alone goes nowhere.

Host syncs: two a layer. DeepEP's dispatch waits on the host for the number of rows that arrive; and `plan` reads its
layout, for the ledger. Memory: R rows and y, and DeepEP's own buffer.

Shape letters as in `kernels`, with K choices a token, so that N = T K.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.kernels import Arrival, KernelDispatcher, KernelPlan, SentCounts
from moe_dist.moe.dispatch.rows import counting_order
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

LAYOUT = "DeepEP layout for the ledger"  # the adaptor's host sync, as CommStats records it
_PAIR_BYTES = 12  # of an int64 id and an fp32 weight


def topk_idx_of(assignments: Assignments, num_tokens: int, top_k: int, number_of_expert_E: Tensor) -> Tensor:
    """DeepEP's `topk_idx` [T, K], int64, -1 for no selection, from token-major assignments.

    Raises:
        ConfigError: not T x K pairs: the assignments are not token choice.
    """
    if assignments.expert_N.shape[0] != num_tokens * top_k:
        raise ConfigError(
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


def make_buffer(group: Any, hidden_dim: int) -> Any:
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


@dataclass(kw_only=True)
class DeepEPPlan(KernelPlan):
    """A plan with DeepEP's ids.

    Attributes:
        topk_idx_TK: int64, -1 for no selection.
        layout: Of `get_dispatch_layout`: tokens to each rank, to each RDMA rank, to each expert, whether a token goes to
            a rank.
    """

    topk_idx_TK: Tensor
    layout: tuple[Tensor, Tensor | None, Tensor, Tensor]


class DeepEPDispatcher(KernelDispatcher[DeepEPPlan]):
    """Dispatch and combine by a `deep_ep.Buffer`.

    Args:
        placement, wire, hidden_dim, buffer: As of `KernelDispatcher`.
        top_k: K, the choices of each token in the assignments.
    """

    LIBRARY = "DeepEP"

    def __init__(
        self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, top_k: int, buffer: Any = None
    ) -> None:
        super().__init__(placement, wire, hidden_dim=hidden_dim, buffer=buffer)
        self.top_k = top_k

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DeepEPPlan:
        """DeepEP's ids and its layout. Syncs with the host for the ledger's counts.

        Raises:
            ConfigError: the assignments are not token choice.
        """
        if self._buffer is None:
            self._buffer = make_buffer(self.wire.group, self.hidden_dim)
        numbers = self.number_of_expert_E(assignments.expert_N.device)
        topk_idx_TK = topk_idx_of(assignments, num_tokens, self.top_k, numbers)
        rows_W, rdma_rows, pairs_E, in_rank_TW, _ = self.buffer.get_dispatch_layout(topk_idx_TK, self.num_slots)
        sizes = self.wire.comm_stats.to_host(LAYOUT, torch.cat([rows_W, pairs_E]))
        size, own, slots = self.placement.num_ranks, self.wire.rank, self.numbers.slots_per_rank
        rows, pairs = sizes[:size], sizes[size:]
        remote_pairs = sum(pairs) - sum(pairs[own * slots : (own + 1) * slots])
        counts = SentCounts(rows[own], sum(rows) - rows[own], sum(pairs), remote_pairs)
        layout = (rows_W, rdma_rows, pairs_E, in_rank_TW)
        return DeepEPPlan(layer=layer, _counts=counts, topk_idx_TK=topk_idx_TK, layout=layout)

    def weights_of_tokens(self, weight_N: Tensor, plan: DeepEPPlan) -> Tensor:
        return weight_N.view(plan.topk_idx_TK.shape)

    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: DeepEPPlan) -> tuple[Any, ...]:
        rows_W, rdma_rows, pairs_E, in_rank_TW = plan.layout
        return self.buffer.dispatch(
            h_TD,
            topk_idx=plan.topk_idx_TK,
            topk_weights=weight_TX,
            num_tokens_per_rank=rows_W,
            num_tokens_per_rdma_rank=rdma_rows,
            is_token_in_rank=in_rank_TW,
            num_tokens_per_expert=pairs_E,
        )

    def settle(self, received: tuple[Any, ...], plan: DeepEPPlan) -> Tensor:
        rows_RD, idx_RK, weight_RK, counts, handle, _ = received
        num_slots = len(self.placement.slots[self.wire.rank])
        slot_N = torch.where(idx_RK < 0, self.numbers.slots_per_rank, idx_RK).reshape(-1)
        pair_Q = counting_order(slot_N, self.numbers.slots_per_rank + 1)[: sum(counts)]
        plan.settle(Arrival(handle, weight_RK, pair_Q, pair_Q // self.top_k, tuple(counts[:num_slots])))
        return rows_RD

    def dispatch_again(self, rows_TD: Tensor, plan: DeepEPPlan) -> Tensor:
        return self.buffer.dispatch(rows_TD, handle=plan.arrival.handle)[0]

    def reduce(self, rows_RD: Tensor, plan: DeepEPPlan, weight_RY: Tensor | None) -> tuple[Tensor, Any]:
        return self.buffer.combine(rows_RD, plan.arrival.handle, topk_weights=weight_RY)[:2]

    def weight_bytes(self, plan: DeepEPPlan) -> int:
        return self.top_k * _PAIR_BYTES
