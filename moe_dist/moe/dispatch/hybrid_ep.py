"""Dispatches and combines by HybridEP's kernels (`deep_ep.HybridEPBuffer`, in DeepEP's branch hybrid-ep); see `kernels`.

HybridEP takes a routing map, which has for each token one bool per expert of all ranks, and weights of the same shape. A
null choice sets no bool. HybridEP could take expert ids instead, but these cannot express null choices, because it scatters
the ids without a mask. Experts are numbered by `SlotNumbers`, which gives each rank a multiple of 4 slots, because the
kernels require it inside an NVLink domain. All ranks must have equally many tokens, a multiple of 4; D, a multiple of 16.

In forward HybridEP gathers the maps of all ranks, sends rows with weights, and sends rows back. Backward sends the same
except the maps. A layer has two host syncs, both in the first dispatch: HybridEP reads the number of arriving rows, and the
adaptor reads the pairs of each slot and the counts of the traffic ledger (`ledger`). Memory: R rows, the output y, and
HybridEP's own buffer.

Shape letters are those of `kernels`, and W ranks, X = W E' slots of all ranks and Y = E' slots of this rank.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.kernels import Arrival, KernelDispatcher, KernelPlan
from moe_dist.moe.dispatch.rows import compact
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertPlacement

COUNTS = "HybridEP pairs of each slot"  # name of the host sync in CommStats
_LOCAL_MAP = 4  # index in HybridEP's handle of the map from arrived rows to own slots, bool [>= R, E']


def routing_map_of(
    assignments: Assignments, num_tokens: int, number_of_expert_E: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Returns HybridEP's map, bool [T, X], and each pair's index in the flattened map, [N]: T X if absent."""
    end = num_tokens * num_slots
    number_N = number_of_expert_E[assignments.expert_N.clamp_min(0)]
    cell_N = torch.where(assignments.expert_N == ABSENT, end, assignments.token_N * num_slots + number_N)
    return _spread(torch.ones_like(cell_N, dtype=torch.bool), cell_N, num_tokens, num_slots), cell_N


def _spread(values_N: Tensor, cell_N: Tensor, num_tokens: int, num_slots: int) -> Tensor:
    """Returns one value per pair as a tensor [T, X], with 0 where there is no pair. Differentiable."""
    table = values_N.new_zeros(num_tokens * num_slots + 1).scatter(0, cell_N, values_N)
    return table[:-1].view(num_tokens, num_slots)


def make_buffer(group: Any, hidden_dim: int, num_tokens: int, slots_per_rank: int) -> Any:
    """Makes a `deep_ep.HybridEPBuffer` for bf16 rows, as a collective. HybridEP enlarges it if more tokens come."""
    return import_module("deep_ep").HybridEPBuffer(  # preflight has checked that deep_ep is installed
        group=group,
        hidden_dim=hidden_dim,
        max_num_of_tokens_per_rank=num_tokens,
        num_local_experts=slots_per_rank,
        use_fp8=False,
    )


@dataclass(kw_only=True)
class HybridEPPlan(KernelPlan):
    """The plan of one layer and micro-batch, with HybridEP's map.

    Attributes:
        routing_map_TX, cell_N: From `routing_map_of`.
        domain_slots: Number of slots on all ranks of this NVLink domain, set by the first dispatch. A row carries a weight
            for each.
    """

    routing_map_TX: Tensor
    cell_N: Tensor
    domain_slots: int = 0


class HybridEPDispatcher(KernelDispatcher[HybridEPPlan]):
    """Dispatches and combines by a `deep_ep.HybridEPBuffer`. See `KernelDispatcher` for the arguments."""

    LIBRARY = "HybridEP"

    def __init__(self, placement: ExpertPlacement, wire: AllToAll, *, hidden_dim: int, buffer: Any = None) -> None:
        super().__init__(placement, wire, hidden_dim=hidden_dim, buffer=buffer, multiple=4)

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> HybridEPPlan:
        """Makes HybridEP's map without a host sync. The first plan also makes the buffer, by a collective call."""
        if self._buffer is None:
            self._buffer = make_buffer(self.wire.group, self.hidden_dim, num_tokens, self.numbers.slots_per_rank)
        numbers = self.number_of_expert_E(assignments.expert_N.device)
        routing_map_TX, cell_N = routing_map_of(assignments, num_tokens, numbers, self.num_slots)
        return HybridEPPlan(layer=layer, routing_map_TX=routing_map_TX, cell_N=cell_N)

    def weights_of_tokens(self, weight_N: Tensor, plan: HybridEPPlan) -> Tensor:
        return _spread(weight_N, plan.cell_N, *plan.routing_map_TX.shape)

    def send(self, rows_TD: Tensor, plan: HybridEPPlan, name: str, weight_TX: Tensor | None = None) -> Tensor:
        """See `KernelDispatcher.send`. The first dispatch also counts the bytes of the gathered map."""
        rows_RD = super().send(rows_TD, plan, name, weight_TX)
        if weight_TX is not None:
            mapped = plan.routing_map_TX.numel() * (self.placement.num_ranks - 1)  # bytes of the map to all other ranks
            self.wire.comm_stats.count("HybridEP routing map", mapped, payload=False)
        return rows_RD

    def first_dispatch(self, h_TD: Tensor, weight_TX: Tensor, plan: HybridEPPlan) -> tuple[Any, ...]:
        return self.buffer.dispatch(h_TD, routing_map=plan.routing_map_TX, probs=weight_TX)

    def settle(self, received: tuple[Any, ...], plan: HybridEPPlan) -> Tensor:
        """See `KernelDispatcher.settle`. Costs one host sync, which reads the number of pairs of each slot."""
        rows_RD, weight_RY, _, handle = received
        size, own, slots = self.placement.num_ranks, self.wire.rank, self.numbers.slots_per_rank
        num_rows = weight_RY.shape[0]
        here_ER = handle[_LOCAL_MAP][:num_rows].t()
        map_TWE = plan.routing_map_TX.view(-1, size, slots)
        sizes_of = [map_TWE.any(2).sum(0), map_TWE.sum((0, 2)), here_ER.sum(1)]
        counts = self.wire.comm_stats.to_host(COUNTS, torch.cat(sizes_of))  # host sync
        rows, pairs, here = counts[:size], counts[size : 2 * size], counts[2 * size :]
        cell_Q = compact(torch.arange(here_ER.numel(), device=here_ER.device), here_ER.reshape(-1), sum(here))
        row_Q, slot_Q = cell_Q % max(1, num_rows), cell_Q // max(1, num_rows)
        plan.domain_slots = weight_RY.shape[1]
        plan.count(own, rows, pairs)
        plan.arrived = Arrival(
            handle=handle,
            weight_RY=weight_RY[:, self._own_columns].contiguous(),
            pair_Q=row_Q * slots + slot_Q,
            row_of_pair_Q=row_Q,
            slot_counts=tuple(here[: len(self.placement.slots[own])]),
        )
        return rows_RD

    def dispatch_again(self, rows_TD: Tensor, plan: HybridEPPlan) -> Tensor:
        options = {"num_of_experts": self.num_slots, "num_dispatched_tokens": plan.arrival.weight_RY.shape[0]}
        return self.buffer.dispatch(rows_TD, handle=plan.arrival.handle, **options)[0]

    def reduce(self, rows_RD: Tensor, plan: HybridEPPlan, weight_RY: Tensor | None) -> tuple[Tensor, Any]:
        probs = None
        if weight_RY is not None:
            probs = weight_RY.new_zeros(weight_RY.shape[0], plan.domain_slots)  # one column per slot of the domain
            probs[:, self._own_columns] = weight_RY
        return self.buffer.combine(rows_RD, probs=probs, handle=plan.arrival.handle)

    def weight_bytes(self, plan: HybridEPPlan) -> int:
        return plan.domain_slots * 4

    @property
    def _own_columns(self) -> slice:
        """The columns of this rank's slots, in a table whose columns are all slots of its NVLink domain."""
        first = self.buffer.local_rank * self.numbers.slots_per_rank
        return slice(first, first + self.numbers.slots_per_rank)
