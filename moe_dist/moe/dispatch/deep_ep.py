"""Dispatches and combines by DeepEP's kernels (`deep_ep.Buffer`, API of V1), for NVLink and RDMA; see the file `kernels`.

DeepEP takes K weights and K expert ids for each token. An expert's id is its number in `SlotNumbers`; -1 means no expert. A
null choice is -1, so a token whose choices are all null goes to no rank.

A layer has two host syncs. For the traffic ledger (module `ledger`), the method `plan` reads how many rows and how many
(token, expert) pairs this rank sends to each rank. DeepEP's dispatch waits until the host knows how many rows arrive.
Memory: R rows, the output y, DeepEP's buffer.

Shape letters are those of `kernels`, and K choices per token, so that N = T K.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.kernels import Arrival, KernelDispatcher, KernelPlan
from moe_dist.moe.dispatch.rows import counting_order
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

LAYOUT = "DeepEP layout for the ledger"  # name of the host sync in CommStats
_PAIR_BYTES = 12  # bytes of an int64 id and an fp32 weight


def topk_idx_of(assignments: Assignments, num_tokens: int, top_k: int, number_of_expert_E: Tensor) -> Tensor:
    """Returns DeepEP's `topk_idx` [T, K], int64, -1 for no expert, from assignments sorted by token.

    Raises:
        ConfigError: there are not T x K pairs, so the router is not token choice.
    """
    if assignments.expert_N.shape[0] != num_tokens * top_k:
        raise ConfigError(
            f"parallel.dispatch.kind=deep_ep takes {top_k} choices of each of {num_tokens} tokens, and got "
            f"{assignments.expert_N.shape[0]} pairs; a router whose experts choose tokens needs "
            "parallel.dispatch.kind=all_to_all"
        )
    token_N = torch.arange(num_tokens, device=assignments.token_N.device).repeat_interleave(top_k)  # the order DeepEP needs
    # asserted on the device, because a check on the host would sync
    in_order = (assignments.token_N == token_N).all()
    torch._assert_async(in_order, "deep_ep: pairs are not in the order of tokens")  # pyright: ignore[reportPrivateImportUsage]
    number_N = number_of_expert_E[assignments.expert_N.clamp_min(0)]
    return torch.where(assignments.expert_N == ABSENT, -1, number_N).view(num_tokens, top_k)


def make_buffer(group: Any, hidden_dim: int) -> Any:
    """Makes a `deep_ep.Buffer` for bf16 rows of width `hidden_dim`, with the sizes that DeepEP suggests. It is a
    collective: the ranks exchange the handles of their buffers as Python objects."""
    deep_ep = import_module("deep_ep")  # preflight has checked that it is installed
    size, row_bytes = group.size(), hidden_dim * 2  # bf16 has 2 bytes
    configs = (deep_ep.Buffer.get_dispatch_config(size), deep_ep.Buffer.get_combine_config(size))
    return deep_ep.Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs),
    )


@dataclass(kw_only=True)
class DeepEPPlan(KernelPlan):
    """The plan of one layer and micro-batch, with DeepEP's expert ids.

    Attributes:
        topk_idx_TK: int64, -1 for no expert.
        layout: Result of `get_dispatch_layout`: number of tokens to each rank, to each RDMA rank and to each expert, and
            a mask [T, ranks] of the ranks that each token goes to.
    """

    topk_idx_TK: Tensor
    layout: tuple[Tensor, Tensor | None, Tensor, Tensor]


class DeepEPDispatcher(KernelDispatcher[DeepEPPlan]):
    """Dispatches and combines by a `deep_ep.Buffer`. See `KernelDispatcher` for the arguments; `top_k` is K."""

    LIBRARY = "DeepEP"

    def __init__(
        self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, top_k: int, buffer: Any = None
    ) -> None:
        super().__init__(placement, wire, hidden_dim=hidden_dim, buffer=buffer)
        self.top_k = top_k

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> DeepEPPlan:
        """Computes DeepEP's ids and layout. Costs one host sync, for the counts of the traffic ledger.

        Raises:
            ConfigError: see `topk_idx_of`.
        """
        if self._buffer is None:
            self._buffer = make_buffer(self.wire.group, self.hidden_dim)
        numbers = self.number_of_expert_E(assignments.expert_N.device)
        topk_idx_TK = topk_idx_of(assignments, num_tokens, self.top_k, numbers)
        rows_W, rdma_rows, pairs_E, in_rank_TW, _ = self.buffer.get_dispatch_layout(topk_idx_TK, self.num_slots)
        pairs_W = pairs_E.view(-1, self.numbers.slots_per_rank).sum(1)
        sizes = self.wire.comm_stats.to_host(LAYOUT, torch.cat([rows_W, pairs_W]))
        size = self.placement.num_ranks
        plan = DeepEPPlan(layer=layer, topk_idx_TK=topk_idx_TK, layout=(rows_W, rdma_rows, pairs_E, in_rank_TW))
        plan.count(self.wire.rank, sizes[:size], sizes[size:])
        return plan

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
        slot_N = torch.where(idx_RK < 0, self.numbers.slots_per_rank, idx_RK).reshape(-1)  # sorts -1 last
        pair_Q = counting_order(slot_N, self.numbers.slots_per_rank + 1)[: sum(counts)]
        plan.arrived = Arrival(handle, weight_RK, pair_Q, pair_Q // self.top_k, tuple(counts[:num_slots]))
        return rows_RD

    def dispatch_again(self, rows_TD: Tensor, plan: DeepEPPlan) -> Tensor:
        return self.buffer.dispatch(rows_TD, handle=plan.arrival.handle)[0]  # no host sync: the handle has the counts

    def reduce(self, rows_RD: Tensor, plan: DeepEPPlan, weight_RY: Tensor | None) -> tuple[Tensor, Any]:
        return self.buffer.combine(rows_RD, plan.arrival.handle, topk_weights=weight_RY)[:2]

    def weight_bytes(self, plan: DeepEPPlan) -> int:
        return self.top_k * _PAIR_BYTES
