"""FFN experts of a frozen base with LoRA adapters in the form of PEFT's `target_parameters` (LoRA, arXiv 2106.09685).

    [gate; up]' x = [gate; up] x + (alpha / r) B A x        A [r, D], B [2 F, r]
    down' h       = down h       + (alpha / r) B A h        A [r, F], B [D, r]

Either each expert has its own A and B, on the expert's rank, or all experts of a group share one A and B, which every rank
holds. Backward computes no product for the gradient of a frozen matrix.

Shape letters: Q (token, expert) pairs computed on this rank, D hidden size, F hidden width, e experts of a group on this
rank, r rank, I inputs and O outputs of a matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.experts.clamped_experts import of_rows
from moe_dist.moe.experts.experts import (
    Activation,
    Experts,
    ExpertStack,
    Inputs,
    choose_gemm,
    grouped_product,
    grouped_swiglu,
    inputs_between,
    row_slices,
    silu_product,
)
from moe_dist.moe.experts.lora import Adapter
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.placement.parameter_names import Role
from moe_dist.placement.placement import ExpertGroup

TARGETS = ("gate_up", "down")
Product = Callable[[Tensor, Tensor], Tensor]  # (x [Q, I], weights [O, I] or [e, O, I]) -> y [Q, O]


class AdaptedStack(ExpertStack):
    """The experts of one group on this rank, with adapters. The adapters of all experts are stacked, `<target>_a` [e, r, I]
    and `<target>_b` [e, O, r]. A shared adapter is `adapters.<target>.a` [r, I] and `.b` [O, r]."""

    biases: ClassVar[Sequence[str]] = ()  # names of the experts' bias parameters, [e, O] each

    def __init__(
        self,
        hidden_dim: int,
        ffn_dim: int,
        num_local: int,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str] = TARGETS,
        shared: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(hidden_dim, ffn_dim, num_local, **options)
        widths = {"gate_up": (hidden_dim, 2 * ffn_dim), "down": (ffn_dim, hidden_dim)}
        self._scale, self._rank, self._targets = alpha / rank, rank, tuple(targets)
        self.adapters = nn.ModuleDict({each: Adapter(*widths[each], rank) for each in targets}) if shared else None
        self.roles: dict[str, Role] = {}  # role, by name, of each parameter whose role differs from the stack's
        for target in () if shared else targets:
            inputs, outputs = widths[target]
            self.register_parameter(f"{target}_a", nn.Parameter(torch.empty(num_local, rank, inputs)))
            self.register_parameter(f"{target}_b", nn.Parameter(torch.empty(num_local, outputs, rank)))
            self.roles |= {f"{target}_a": Role.EXPERT_ADAPTER, f"{target}_b": Role.EXPERT_ADAPTER}

    def forward(self, x_QD: Inputs, counts: Sequence[int], activate: Activation = silu_product) -> Tensor:
        """Applies each adapted expert to its block of consecutive rows of x: x [sum(counts), D] -> y [sum(counts), D]."""
        for_gate_QD, for_up_QD = inputs_between(x_QD, 0, sum(counts))
        if not counts:  # every rank holds a shared adapter, so the adapter's gradient must be zero here, not None
            return (
                for_gate_QD + sum(0.0 * each.sum() for each in self.adapters.parameters()) if self.adapters else for_gate_QD
            )
        device, dtype, widths = for_gate_QD.device, for_gate_QD.dtype, (*self.widths, self._rank)
        gemm = choose_gemm(self.gemm, dtype=dtype, device=device, widths=widths, num_experts=len(counts))
        names = ("gate", "up", "down", *self.biases, *self.roles)
        stacks = {name: self.weight(name, dtype) for name in names}
        if gemm is grouped_swiglu and sum(counts):
            stacks |= {name: of_rows(stacks[name], counts) for name in self.biases}
            inputs = for_gate_QD, for_up_QD, slice(0, sum(counts))
            return self._swiglu(*inputs, stacks, grouped_product(counts, device), activate)
        each = zip(*(stack.unbind() for stack in stacks.values()), strict=True)
        runs = zip(for_gate_QD.split(list(counts)), for_up_QD.split(list(counts)), row_slices(counts), each, strict=True)
        return torch.cat(
            [
                self._swiglu(gate, up, rows, dict(zip(names, one, strict=True)), F.linear, activate)
                for gate, up, rows, one in runs
            ]
        )

    def _swiglu(
        self,
        for_gate_QD: Tensor,
        for_up_QD: Tensor,
        rows: slice,
        weights: Mapping[str, Tensor],
        product: Product,
        activate: Activation,
    ) -> Tensor:
        gate_QF = self._frozen("gate", for_gate_QD, weights, product)
        up_QF = self._frozen("up", for_up_QD, weights, product)
        if "gate_up" in self._targets:
            gate_delta_QF, up_delta_QF = self._delta("gate_up", for_gate_QD, weights, product).chunk(2, dim=-1)
            gate_QF, up_QF = gate_QF + gate_delta_QF, up_QF + up_delta_QF
        hidden_QF = activate(gate_QF, up_QF, rows)
        y_QD = self._frozen("down", hidden_QF, weights, product)
        return y_QD + self._delta("down", hidden_QF, weights, product) if "down" in self._targets else y_QD

    def _frozen(self, name: str, x_QI: Tensor, weights: Mapping[str, Tensor], product: Product) -> Tensor:
        y_QO = product(x_QI, weights[name])
        return y_QO + weights[f"{name}_bias"] if self.biases else y_QO

    def _delta(self, target: str, x_QI: Tensor, weights: Mapping[str, Tensor], product: Product) -> Tensor:
        if self.adapters is not None:
            return self._scale * self.adapters[target](x_QI)
        return self._scale * product(product(x_QI, weights[f"{target}_a"]), weights[f"{target}_b"])


class AdaptedExperts(Experts):
    """All true (not null) experts of this rank, one `AdaptedStack` per group. For arguments see `Experts`.

    Args:
        adapter: Keywords of `AdaptedStack`: rank, alpha, targets, shared.
    """

    stack: ClassVar[type[AdaptedStack]] = AdaptedStack

    def __init__(
        self, hidden_dim: int, groups: Sequence[ExpertGroup], num_local: Sequence[int], *, pair_budget: int | None = None,
        gemm: Any = "loop", kernels: RowKernels = TORCH, dropout: float = 0.0, **adapter: Any,
    ) -> None:  # fmt: skip
        assert not dropout, "the configuration refuses dropout on experts"
        stack = partial(self.stack, **adapter)
        super().__init__(hidden_dim, groups, num_local, pair_budget=pair_budget, gemm=gemm, stack=stack, kernels=kernels)

    def forward(self, dispatched: DispatchedRows, plan: PairLayout, *, recompute: bool = False) -> Tensor:
        """See `Experts.forward`. Makes dispatched rows from frozen layers require a gradient, so that all ranks, also ranks
        without experts, issue the exchange of combine's backward."""
        rows_RD = dispatched.rows_RD
        if torch.is_grad_enabled() and not rows_RD.requires_grad:
            dispatched = replace(dispatched, rows_RD=rows_RD.detach().requires_grad_())
        return super().forward(dispatched, plan, recompute=recompute)
