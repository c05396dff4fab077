"""The true experts of this rank for plans of fixed sizes (`dispatch/static.py`). The experts' row counts stay on the
device.

(token, expert) pairs of a group are consecutive: the pairs of each expert in order, then padding. The grouped product reads
the experts' rows from offsets on the device. The grouped product's results in padding rows are undefined and never used.
Shape letters as in `experts.py`; P is the number of places for a group's pairs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.dispatch.static_planning import StaticPlan
from moe_dist.moe.experts.experts import (
    Activation,
    Experts,
    ExpertStack,
    Inputs,
    inputs_between,
    loop_swiglu,
    rows_between,
    silu_product,
    why_not_grouped,
)
from moe_dist.moe.routing.draws import recomputed
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup


class StaticStack(ExpertStack):
    def forward(self, x_QD: Inputs, counts: Any, activate: Activation = silu_product) -> Tensor:
        """Applies each expert to its block of consecutive rows. `counts` is the plan's `counts_X` and `end_X` of the
        group's slots."""
        for_gate_PD, for_up_PD = x_QD if isinstance(x_QD, tuple) else (x_QD, x_QD)
        room, device, dtype = for_gate_PD.shape[0], for_gate_PD.device, for_gate_PD.dtype
        counts_e, end_e = counts
        if not len(counts_e):  # as in `ExpertStack`
            return for_gate_PD
        if device.type == "cpu" and (not room or why_not_grouped(dtype, device, self.widths)):
            gate, up, down = (self.weight(name, dtype) for name in ("gate", "up", "down"))
            rows = end_e.diff(prepend=end_e.new_zeros(1)).tolist()  # the tensor is on the CPU, so this does not sync
            y_QD = loop_swiglu(x_QD, gate, up, down, rows, activate)
            return F.pad(y_QD, (0, 0, 0, room - y_QD.shape[0]))
        gate, up, down = self.grouped_weights(dtype)
        product = _Product(counts_e, end_e)
        up_PF = None if up is None else product(for_up_PD, up)
        return product(activate(product(for_gate_PD, gate), up_PF, slice(0, room)), down)


class _Product:
    """Multiplies each expert's rows with the expert's matrix, by one grouped product."""

    def __init__(self, counts_e: Tensor, end_e: Tensor) -> None:
        self.offsets, self.empty_e11 = end_e, (counts_e == 0)[:, None, None]

    def __call__(self, x_PI: Tensor, weight_eOI: Tensor) -> Tensor:
        weight_eOI = weight_eOI.view_as(weight_eOI)  # a hook on the parameter would persist
        if weight_eOI.requires_grad:  # because torch does not document the gradient of an expert without rows
            weight_eOI.register_hook(lambda gradient: gradient.masked_fill(self.empty_e11, 0.0))
        y_PO = F.grouped_mm(x_PI, weight_eOI.transpose(-2, -1), offs=self.offsets)
        if y_PO.requires_grad:
            y_PO.register_hook(Tensor.contiguous)  # grouped_mm refuses gradients of stride 0, which `expand` makes
        return y_PO


class StaticExperts(Experts):
    """See `Experts`. All (token, expert) pairs are computed at once."""

    def __init__(
        self,
        hidden_dim: int,
        groups: Sequence[ExpertGroup],
        num_local: Sequence[int],
        *,
        pair_budget: None = None,
        **options: Any,
    ) -> None:
        super().__init__(hidden_dim, groups, num_local, stack=StaticStack, **options)

    def forward(self, dispatched: DispatchedRows, plan: Any, *, recompute: bool = False) -> Tensor:
        run = partial(recomputed, self._sums) if recompute else self._sums
        return run(dispatched.rows_RD, dispatched.weight_Q, plan)

    def _sums(self, rows_RD: Tensor, weight_Q: Tensor, plan: StaticPlan) -> Tensor:
        index = plan.pair_index(rows_RD.shape[0])
        inputs = self.kernels.gather(rows_RD, index)
        outputs, at, slot = [], 0, 0
        for (name, num_local), room in zip(self.local, plan.room_G, strict=True):
            end, slots = at + room, slice(slot, slot + num_local)
            activate = partial(self._activate, rows_between(weight_Q, at, end))
            stack = self.get_submodule(group_module(name))
            outputs.append(stack(inputs_between(inputs, at, end), (plan.counts_X[slots], plan.end_X[slots]), activate))
            at, slot = end, slot + num_local
        y_QD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.kernels.sum_pairs(y_QD, weight_Q, index, rows_RD.dtype)
