"""FFN experts with biases and a clamped SwiGLU (gpt-oss):

    g = min(W_g x + b_g, limit),  u = clamp(W_u x + b_u, -limit, limit)
    y = W_d (g sigmoid(alpha g) (u + 1)) + b_d

Shape letters: Q (token, expert) pairs computed here, D hidden size, F hidden width, e experts of a group on this rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_dist.comm.collectives import from_host
from moe_dist.moe.experts.experts import (
    Activation,
    Experts,
    ExpertStack,
    Inputs,
    choose_gemm,
    grouped_product,
    grouped_swiglu,
    inputs_between,
    silu_product,
)
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.placement.placement import ExpertGroup


class ClampedStack(ExpertStack):
    """The experts of one group on this rank, with `gate_bias`, `up_bias` [e, F] and `down_bias` [e, D]."""

    initial_values: ClassVar = {"gate_bias": 0.0, "up_bias": 0.0, "down_bias": 0.0}

    def __init__(
        self, hidden_dim: int, ffn_dim: int, num_local: int, *, alpha: float, limit: float, **options: Any
    ) -> None:
        super().__init__(hidden_dim, ffn_dim, num_local, **options)
        self.alpha, self.limit = alpha, limit
        self.gate_bias = nn.Parameter(torch.empty(num_local, ffn_dim))
        self.up_bias = nn.Parameter(torch.empty(num_local, ffn_dim))
        self.down_bias = nn.Parameter(torch.empty(num_local, hidden_dim))

    def forward(self, x_QD: Inputs, counts: Sequence[int], activate: Activation = silu_product) -> Tensor:
        """Applies each expert to its block of consecutive rows: x [sum(counts), D] -> y [sum(counts), D]."""
        for_gate_QD, for_up_QD = inputs_between(x_QD, 0, sum(counts))
        if not counts:  # as in `ExpertStack`
            return for_gate_QD
        dtype, device = for_gate_QD.dtype, for_gate_QD.device
        gemm = choose_gemm(self.gemm, dtype=dtype, device=device, widths=self.widths, num_experts=len(counts))
        if gemm is grouped_swiglu and sum(counts):
            product, runs = grouped_product(counts, device), [sum(counts)]
        else:  # one tensor per expert, because the last bits of a sigmoid depend on the tensor's size
            product, runs = partial(_looped, counts=counts), list(counts)

        def affine(x: Tensor, name: str) -> Tensor:
            return product(x, self.weight(name, dtype)) + of_rows(self.weight(f"{name}_bias", dtype), counts)

        both = affine(for_gate_QD, "gate").split(runs), affine(for_up_QD, "up").split(runs)
        hidden = [clamped_product(gate, up, self.alpha, self.limit) for gate, up in zip(*both, strict=True)]
        return affine(torch.cat(hidden), "down")


def clamped_product(gate_QF: Tensor, up_QF: Tensor, alpha: float, limit: float) -> Tensor:
    """Returns g sigmoid(alpha g) (u + 1), [Q, F], where g = min(gate, limit), and u is up clamped to +-limit."""
    gate_QF, up_QF = gate_QF.clamp(max=limit), up_QF.clamp(-limit, limit)
    return gate_QF * (alpha * gate_QF).sigmoid() * (up_QF + 1)


def of_rows(bias_eO: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the bias of the expert of each input row, [sum(counts), O]."""
    rows_e = from_host(counts, torch.int64, bias_eO.device)
    return bias_eO.repeat_interleave(rows_e, dim=0, output_size=sum(counts))


def _looped(x_QI: Tensor, weight_eOI: Tensor, *, counts: Sequence[int]) -> Tensor:
    """Multiplies input rows by their experts' weights, one expert after the other."""
    return torch.cat([run @ weight.T for run, weight in zip(x_QI.split(list(counts)), weight_eOI.unbind(), strict=True)])


class ClampedExperts(Experts):
    """All true (not null) experts of this rank, one `ClampedStack` per group. For arguments see `Experts`; the top of this
    file defines `alpha` and `limit`. Ignores the argument `kernels` and uses torch's kernels, which multiply each expert's
    output, bias included, by the routing weight."""

    def __init__(
        self, hidden_dim: int, groups: Sequence[ExpertGroup], num_local: Sequence[int], *, pair_budget: int | None = None,
        gemm: Any = "loop", kernels: RowKernels = TORCH, **form: float,
    ) -> None:  # fmt: skip
        stack: Callable[..., ExpertStack] = partial(ClampedStack, **form)
        super().__init__(hidden_dim, groups, num_local, pair_budget=pair_budget, gemm=gemm, stack=stack, kernels=TORCH)
