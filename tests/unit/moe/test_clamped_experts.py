"""Experts with biases and a clamped SwiGLU equal their formula, expert by expert, also an expert without rows. With
adapters they equal experts whose weights include the adapters."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from moe_dist.moe.experts.adapted_clamped_experts import AdaptedClampedStack
from moe_dist.moe.experts.clamped_experts import ClampedStack
from moe_dist.moe.experts.experts import ExpertStack

COUNTS, ALPHA, LIMIT, RANK, SCALE = (5, 0, 3), 1.3, 0.4, 4, 1.5
STACKS = {
    "plain": lambda gemm: ClampedStack(8, 12, 3, alpha=ALPHA, limit=LIMIT, gemm=gemm),
    "adapted": lambda gemm: AdaptedClampedStack(
        8, 12, 3, rank=RANK, alpha=RANK * SCALE, swiglu_alpha=ALPHA, swiglu_limit=LIMIT, gemm=gemm
    ),
}


def by_formula(stack: ExpertStack, x_QD: Tensor) -> Tensor:
    named, outputs = dict(stack.named_parameters()), []
    for expert, run in enumerate(x_QD.split(COUNTS)):
        gate, up, down = (named[part][expert] for part in ("gate", "up", "down"))
        if "down_a" in named:
            both = SCALE * named["gate_up_b"][expert] @ named["gate_up_a"][expert]
            gate, up = gate + both[: len(gate)], up + both[len(gate) :]
            down = down + SCALE * named["down_b"][expert] @ named["down_a"][expert]
        gate = torch.minimum(run @ gate.T + named["gate_bias"][expert], torch.tensor(LIMIT, dtype=x_QD.dtype))
        up = torch.clamp(run @ up.T + named["up_bias"][expert], -LIMIT, LIMIT)
        hidden = gate / (1 + (-ALPHA * gate).exp()) * (up + 1)
        outputs.append(hidden @ down.T + named["down_bias"][expert])
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize(
    ("gemm", "dtype", "bound"), [("loop", torch.float64, 1e-9), ("grouped", torch.float32, 1e-5)], ids=["loop", "grouped"]
)
def test_equals_its_formula(kind: str, gemm: Literal["loop", "grouped"], dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    stack = STACKS[kind](gemm).to(dtype)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(sum(COUNTS), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(sum(COUNTS), 8, dtype=dtype)
    inputs, found = [x, *stack.parameters()], []
    for out in (stack(x, COUNTS), by_formula(stack, x)):
        found.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=bound, atol=bound)
    assert not found[0][1][1][1].any()  # the gradient is zero, not None
