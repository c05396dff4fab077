"""Storage for plans of fixed sizes (`dispatch/static.py`). The experts' numbers of rows stay on the device.

The (token, expert) pairs of a group are consecutive: first the pairs of each expert in order, then padding. The grouped
product reads the ends of the experts' rows from the device. Its results for padding rows are undefined and never used. The
gradient of a shared adapter would use these results, so the configuration rejects shared adapters with fixed sizes.

Shape letters are as in `products.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.dispatch.static_planning import StaticPlan
from moe_dist.moe.experts.experts import Chunk, Runs
from moe_dist.moe.experts.products import ExpertGemm, Product, offset_product, why_not_grouped


@dataclass(frozen=True)
class DeviceRuns(Runs):
    """Runs whose lengths and ends [e] are on the device. `room` is the fixed number of rows, including padding."""

    lengths: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    end_e: Tensor
    room: int

    @property
    def num_rows(self) -> int:
        return self.room

    def counts(self) -> Sequence[int]:
        return self.end_e.diff(prepend=self.end_e.new_zeros(1)).tolist()  # called only on the CPU, so it does not sync

    def grouped(self, kind: ExpertGemm, like: Tensor, widths: Sequence[int]) -> bool:
        return like.device.type != "cpu" or (self.room > 0 and why_not_grouped(like.dtype, like.device, widths) is None)

    def product(self, device: torch.device) -> Product:
        empty_e11 = (self.lengths == 0)[:, None, None]
        return offset_product(self.end_e, lambda gradient: gradient.masked_fill(empty_e11, 0.0))

    def of_rows(self, bias_eO: Tensor) -> Tensor:
        row_Q = torch.arange(self.room, dtype=self.end_e.dtype, device=bias_eO.device)
        expert_Q = torch.searchsorted(self.end_e, row_Q, right=True)
        return F.pad(bias_eO, (0, 0, 0, 1)).index_select(0, expert_Q)  # padding, whose gradients are undefined, comes last


def on_device(dispatched: DispatchedRows, plan: StaticPlan, slots: Sequence[int], budget: int | None) -> list[Chunk]:
    """Returns all pairs of the plan as one chunk."""
    runs, first = [], 0
    for number, room in zip(slots, plan.room_G, strict=True):
        place = slice(first, first + number)
        runs.append(DeviceRuns(plan.counts_X[place], plan.end_X[place], room))
        first = place.stop
    return [Chunk(slice(0, len(dispatched.weight_Q)), plan.pair_index, runs)]
