"""The clamped SwiGLU of experts with biases (gpt-oss):

g = min(W_g x + b_g, limit),  u = clamp(W_u x + b_u, -limit, limit)
y = W_d (g sigmoid(alpha g) (u + 1)) + b_d
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class ClampedSwiGLU:
    alpha: float
    limit: float
    has_bias: ClassVar[bool] = True
    in_row_kernels: ClassVar[bool] = False

    def __call__(self, gate_QF: Tensor, up_QF: Tensor) -> Tensor:
        gate_QF, up_QF = gate_QF.clamp(max=self.limit), up_QF.clamp(-self.limit, self.limit)
        return gate_QF * (self.alpha * gate_QF).sigmoid() * (up_QF + 1)
