"""The activation of experts. To add an activation, write a class like `SwiGLU` in a new file. `Experts` gets an instance.

Shape letters: Q (token, expert) pairs, F hidden width of experts.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor


class Activation(Protocol):
    """The function that computes the hidden values of (token, expert) pairs from gate and up. If `in_row_kernels` is false,
    the experts do not use `RowKernels.swiglu`, but torch's row kernels. These multiply each expert's output, including its
    bias, by the routing weight."""

    has_bias: ClassVar[bool]
    in_row_kernels: ClassVar[bool]

    def __call__(self, gate_QF: Tensor, up_QF: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up."""

    has_bias: ClassVar[bool] = False
    in_row_kernels: ClassVar[bool] = True

    def __call__(self, gate_QF: Tensor, up_QF: Tensor) -> Tensor:
        return F.silu(gate_QF) * up_QF


SWIGLU = SwiGLU()


@dataclass(frozen=True)
class ClampedSwiGLU:
    """The clamped SwiGLU of experts with biases (gpt-oss): with g = min(gate, limit) and u = clamp(up, -limit, limit),
    g sigmoid(alpha g) (u + 1)."""

    alpha: float
    limit: float
    has_bias: ClassVar[bool] = True
    in_row_kernels: ClassVar[bool] = False

    def __call__(self, gate_QF: Tensor, up_QF: Tensor) -> Tensor:
        gate_QF, up_QF = gate_QF.clamp(max=self.limit), up_QF.clamp(-self.limit, self.limit)
        return gate_QF * (self.alpha * gate_QF).sigmoid() * (up_QF + 1)
