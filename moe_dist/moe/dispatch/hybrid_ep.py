"""Dispatches and combines by HybridEP's kernels (`deep_ep.HybridEPBuffer`, in DeepEP's branch hybrid-ep); see `kernels`.

HybridEP takes a routing map and weights of the same shape. The map has for each token one bool per expert of all ranks. A
null choice sets no bool to true. HybridEP also accepts expert ids instead of a map. But ids cannot express null choices,
because HybridEP scatters the ids without a mask. `SlotNumbers` numbers the experts and gives each rank a multiple of 4
slots, because the kernels require this inside an NVLink domain. All ranks must have the same number of tokens, a multiple
of 4. D must be a multiple of 16.

In forward HybridEP gathers the maps of all ranks, sends rows with weights, and sends rows back. Backward sends gradients of
rows and weights in the reverse directions, and no maps. HybridEP's dispatch also copies rows into one row for each pair,
sorted by slot, and its combine sums a token's rows. With the options `fuse_...`, the kernels that send rows do this, too.
The memory contains Q rows, the output y and HybridEP's buffer.

Shape letters are as in `kernels`. X = W E' is the number of slots of all ranks.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.kernels import Arrival, KernelDispatcher, KernelPlan, require_card
from moe_dist.moe.routing.types import ABSENT, Assignments

_ARRIVED = 3  # index, in HybridEP's handle, of the number of arrived rows: int32 [1] in host memory


def routing_map_of(
    assignments: Assignments, num_tokens: int, number_of_expert_E: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Returns HybridEP's map, bool [T, X], and each pair's index in the flattened map [N], T X if absent."""
    end = num_tokens * num_slots
    number_N = number_of_expert_E[assignments.expert_N.clamp_min(0)]
    cell_N = torch.where(assignments.expert_N == ABSENT, end, assignments.token_N * num_slots + number_N)
    return _spread(torch.ones_like(cell_N, dtype=torch.bool), cell_N, num_tokens, num_slots), cell_N


def _spread(values_N: Tensor, cell_N: Tensor, num_tokens: int, num_slots: int) -> Tensor:
    """Returns one value per (token, expert) pair as a tensor [T, X], with 0 where there is no pair. Differentiable."""
    table = values_N.new_zeros(num_tokens * num_slots + 1).scatter(0, cell_N, values_N)
    return table[:-1].view(num_tokens, num_slots)


@dataclass(kw_only=True)
class HybridEPPlan(KernelPlan):
    """The plan of one layer and micro-batch, with HybridEP's map. `routing_map_of` returns the map and `cell_N`."""

    routing_map_TX: Tensor
    cell_N: Tensor


class HybridEPDispatcher(KernelDispatcher[HybridEPPlan]):
    """Dispatches and combines tokens by a `deep_ep.HybridEPBuffer`."""

    LIBRARY = "HybridEP"

    def __init__(self, context: DispatchContext) -> None:
        super().__init__(context, multiple=4)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> HybridEPPlan:
        """Makes HybridEP's map without a host sync. The first plan also makes HybridEP's buffer, by a collective call.
        HybridEP enlarges the buffer if a later plan has more tokens. Raises ConfigError if `require_card` does."""
        if self.buffer is None:
            require_card("HybridEP")
            self.buffer = import_module("deep_ep").HybridEPBuffer(  # preflight has checked that deep_ep is installed
                group=self.wire.group,
                hidden_dim=self.hidden_dim,
                max_num_of_tokens_per_rank=num_tokens,
                num_local_experts=self.numbers.slots_per_rank,
                use_fp8=False,
            )
        numbers = self.number_of_expert_E(assignments.expert_N.device)
        routing_map_TX, cell_N = routing_map_of(assignments, num_tokens, numbers, self.num_slots)
        pairs_TW = routing_map_TX.unflatten(1, (self.placement.num_ranks, self.numbers.slots_per_rank)).sum(2)
        own: dict[str, Any] = {"routing_map_TX": routing_map_TX, "cell_N": cell_N}
        return HybridEPPlan(layer=layer, rank=self.wire.rank, counts=self.counts(pairs_TW), **own)

    def weights_of_tokens(self, weight_N: Tensor, plan: HybridEPPlan) -> Tensor:
        return _spread(weight_N, plan.cell_N, *plan.routing_map_TX.shape)

    def send(self, rows_TD: Tensor, plan: HybridEPPlan, name: str, weight_TX: Tensor | None = None) -> Tensor:
        """Sends rows (see `KernelDispatcher.send`). The first dispatch also counts the bytes of the gathered map."""
        rows_QD = super().send(rows_TD, plan, name, weight_TX)
        if weight_TX is not None:
            mapped = plan.routing_map_TX.numel() * (self.placement.num_ranks - 1)  # bytes sent to all other ranks
            self.wire.comm_stats.count("HybridEP routing map", mapped, payload=False)
        return rows_QD

    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: HybridEPPlan) -> tuple[Tensor, Arrival]:
        rows_QD, weight_Q, _, counts_E, handle = self.buffer.dispatch_with_permute(
            hidden=h_TD,
            routing_map=plan.routing_map_TX,
            probs=weight_TX,
            num_of_experts_per_rank=self.numbers.slots_per_rank,
            fuse_permute_dispatch=True,
        )
        # The numbers of rows and of pairs are in host memory, because HybridEP has waited for both.
        return rows_QD, Arrival(handle, weight_Q, int(handle[_ARRIVED]), self.own_counts(counts_E.tolist()))

    def dispatch_again(self, rows_TD: Tensor, plan: HybridEPPlan) -> Tensor:
        arrival = plan.arrival
        options = {"num_permuted_tokens": sum(arrival.slot_counts), "fuse_permute_dispatch": True}
        return self.buffer.dispatch_with_permute(hidden=rows_TD, handle=arrival.handle, **options)[0]

    def reduce(self, rows_QD: Tensor, plan: HybridEPPlan, weight_Q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.buffer.combine_with_unpermute(
            hidden=rows_QD, probs=weight_Q, handle=plan.arrival.handle, fuse_unpermute_combine=True
        )

    def weight_bytes(self, plan: HybridEPPlan) -> int:
        ranks = self.buffer.num_of_hybrid_ep_ranks_per_nvlink_domain
        return ranks * self.numbers.slots_per_rank * 4  # each row is sent with weights for all slots of an NVLink domain
