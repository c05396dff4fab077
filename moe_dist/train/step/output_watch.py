"""Measures the size of each expert's output in one step, for hints about experts without effect.

Backward computes, for each (token, expert) pair, the gradient g of the layer's output and the gradient g f of the pair's
routing weight, where f is the expert's output. (g f)^2 / g^2 is thus the squared length of f along g. All engines and
dispatchers have both gradients, so no output is kept, and no row is read again except g.

Shape letters: L MoE layers, E experts, Q pairs and R rows of this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.collectives import from_host
from moe_dist.moe.dispatch.interface import DispatchedRows, RunExperts
from moe_dist.moe.layer import MoELayer


class OutputWatch:
    """Measures the layers of this rank.

    Args:
        layers: The MoE layers, and the index in L of each. Layers of another class are not measured.
        shape: Numbers L and E.
        slots: Returns the experts of this rank, in the order of its slots.

    Attributes:
        sums_LE2: Sum of the squared lengths, and number of pairs; float64. Experts of other ranks have 0.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, Any]],
        shape: tuple[int, int],
        slots: Callable[[], Sequence[int]],
        device: torch.device,
    ) -> None:
        self._layers = [(at, layer) for at, layer in layers if isinstance(layer, MoELayer)]
        self._slots, self.sums_LE2 = slots, torch.zeros(*shape, 2, dtype=torch.float64, device=device)

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Measures the step that runs inside."""
        self.sums_LE2.zero_()
        for at, layer in self._layers:
            layer.around_experts = partial(self._run, at)
        try:
            yield
        finally:
            for _, layer in self._layers:
                layer.around_experts = None

    def _run(self, at: int, experts: RunExperts, rows: DispatchedRows, layout: Any) -> Tensor:
        out_RD, weight_Q = experts(rows, layout), rows.weight_Q
        # Plans of fixed sizes keep the numbers of pairs on the device.
        if out_RD.requires_grad and weight_Q.requires_grad and hasattr(layout, "slot_counts"):
            norms: list[Tensor] = []  # of g, which backward computes first
            out_RD.register_hook(lambda g_RD: norms.append(g_RD.float().norm(dim=1)))
            weight_Q.register_hook(lambda gf_Q: self._add(at, gf_Q, norms.pop(), layout))
        return out_RD

    def _add(self, at: int, gf_Q: Tensor, norm_R: Tensor, layout: Any) -> None:
        counts, slots, norm_Q = layout.slot_counts, self._slots(), norm_R[layout.row_of_pair_Q]
        slot_Q = torch.arange(len(counts), device=norm_Q.device)
        slot_Q = slot_Q.repeat_interleave(from_host(counts, torch.int64, norm_Q.device), output_size=len(norm_Q))
        square_Q = torch.where(norm_Q > 0, gf_Q.float() / norm_Q, 0.0).square()
        both_Q2 = torch.stack([square_Q, norm_Q > 0], dim=1).double()
        sums = both_Q2.new_zeros(len(counts), 2).index_add_(0, slot_Q, both_Q2)[: len(slots)]  # replicas come last
        self.sums_LE2[at].index_add_(0, from_host(slots[: len(sums)], torch.int64, norm_Q.device), sums)
