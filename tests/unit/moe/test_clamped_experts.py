"""Experts with biases and a clamped SwiGLU equal their formula, expert by expert, also one without rows."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from moe_dist.moe.clamped_experts import ClampedStack

COUNTS, ALPHA, LIMIT = (5, 0, 3), 1.3, 0.4


def by_formula(stack: ClampedStack, x_QD: Tensor) -> Tensor:
    outputs = []
    for expert, run in enumerate(x_QD.split(COUNTS)):
        gate = torch.minimum(run @ stack.gate[expert].T + stack.gate_bias[expert], torch.tensor(LIMIT, dtype=x_QD.dtype))
        up = torch.clamp(run @ stack.up[expert].T + stack.up_bias[expert], -LIMIT, LIMIT)
        hidden = gate / (1 + (-ALPHA * gate).exp()) * (up + 1)
        outputs.append(hidden @ stack.down[expert].T + stack.down_bias[expert])
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("gemm", "dtype", "bound"), [("loop", torch.float64, 1e-9), ("grouped", torch.float32, 1e-5)], ids=["loop", "grouped"]
)
def test_equals_its_formula(gemm: Literal["loop", "grouped"], dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    stack = ClampedStack(8, 12, 3, alpha=ALPHA, limit=LIMIT, gemm=gemm).to(dtype)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(sum(COUNTS), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(sum(COUNTS), 8, dtype=dtype)
    inputs, found = [x, *stack.parameters()], []
    for out in (stack(x, COUNTS), by_formula(stack, x)):
        found.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=bound, atol=bound)
    assert not found[0][1][1][1].any()  # zero and not None
