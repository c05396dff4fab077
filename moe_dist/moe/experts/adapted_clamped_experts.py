"""Adds the LoRA adapters of `adapted_experts.py` to frozen FFN experts with biases and a clamped SwiGLU
(`clamped_experts.py`). The outputs of the adapters of gate and up are added before the clamps.

Shape letters: Q (token, expert) pairs computed on this rank, D hidden size, F hidden width, e experts of a group on this
rank.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_dist.moe.experts.adapted_experts import AdaptedExperts, AdaptedStack
from moe_dist.moe.experts.clamped_experts import ClampedStack, clamped_product
from moe_dist.moe.experts.experts import Activation, Inputs, silu_product
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH


class AdaptedClampedStack(AdaptedStack):
    """The experts of one group on this rank, as in `ClampedStack`, with the adapters of `AdaptedStack`."""

    biases: ClassVar[Sequence[str]] = ("gate_bias", "up_bias", "down_bias")
    initial_values: ClassVar = ClampedStack.initial_values

    def __init__(
        self, hidden_dim: int, ffn_dim: int, num_local: int, *, swiglu_alpha: float, swiglu_limit: float, **options: Any
    ) -> None:
        super().__init__(hidden_dim, ffn_dim, num_local, **options)
        self._form = swiglu_alpha, swiglu_limit
        for name, width in zip(self.biases, (ffn_dim, ffn_dim, hidden_dim), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(num_local, width)))

    def forward(self, x_QD: Inputs, counts: Sequence[int], activate: Activation = silu_product) -> Tensor:
        """Does the same as `AdaptedStack.forward`, but uses the clamped activation instead of `activate`."""
        return super().forward(x_QD, counts, self._activate)

    def _activate(self, gate_QF: Tensor, up_QF: Tensor | None, rows: slice) -> Tensor:
        assert up_QF is not None
        return clamped_product(gate_QF, up_QF, *self._form)


class AdaptedClampedExperts(AdaptedExperts):
    """All true (not null) experts of this rank, one `AdaptedClampedStack` per group. Ignores the argument `kernels` and
    uses operations of torch, as `ClampedExperts` does."""

    stack: ClassVar[type[AdaptedStack]] = AdaptedClampedStack

    def __init__(self, *arguments: Any, kernels: RowKernels = TORCH, **options: Any) -> None:
        super().__init__(*arguments, kernels=TORCH, **options)
