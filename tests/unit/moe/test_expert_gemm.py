"""Grouped products against the loop and against one expert at a time: values, gradients, empty experts, unused rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.experts import experts as experts_file
from moe_dist.moe.experts.experts import GROUPED_ON_CPU, choose_gemm, grouped_swiglu, loop_swiglu, why_not_grouped
from tests.support.messages import refused

CPU = torch.device("cpu")
COUNTS = {
    "even": (3, 3, 3),
    "uneven": (5, 1, 2),
    "empty first": (0, 4, 3),
    "empty middle": (4, 0, 3),
    "empty last": (2, 5, 0),
    "one": (0, 7, 0),
    "none": (0, 0, 0),
}


def inputs(counts: tuple[int, ...], dtype: torch.dtype, tail: int = 0) -> list[Tensor]:
    torch.manual_seed(0)
    experts, dim, ffn = len(counts), 16, 8
    shapes = [(sum(counts) + tail, dim), (experts, ffn, dim), (experts, ffn, dim), (experts, dim, ffn)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Returns eight units in the last place of the largest entry."""
    return 8 * torch.finfo(dtype).eps * float(exact.detach().abs().max() if exact.numel() else 0.0)


def by_expert(x_QD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The oracle: computes one row after the other."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [down[e] @ (F.silu(gate[e] @ x) * (up[e] @ x)) for x, e in zip(x_QD, owners, strict=False)]
    return torch.stack(rows) if rows else x_QD[:0]


def value_and_gradients(swiglu: Callable[..., Tensor], arguments: list[Tensor], counts: Any) -> list[Tensor]:
    y_QD = swiglu(*arguments, counts)
    direction = torch.linspace(-1, 1, y_QD.numel()).view_as(y_QD).to(y_QD.dtype)
    gradients = torch.autograd.grad((y_QD * direction).sum(), arguments, allow_unused=True)
    return [y_QD, *(torch.zeros_like(a) if g is None else g for a, g in zip(arguments, gradients, strict=True))]


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_equals_loop_and_oracle(counts: tuple[int, ...], dtype: torch.dtype, tail: int) -> None:
    arguments = inputs(counts, dtype, tail)
    grouped = value_and_gradients(grouped_swiglu, arguments, counts)
    loop = value_and_gradients(loop_swiglu, arguments, counts)
    exact = [argument.detach().float().requires_grad_() for argument in arguments]
    for ours, theirs, oracle in zip(grouped, loop, value_and_gradients(by_expert, exact, counts), strict=True):
        bound = rounding(oracle, dtype)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=bound)
        torch.testing.assert_close(ours.float(), oracle, rtol=0, atol=bound)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS.values() if 0 in counts], ids=str)
def test_what_a_kernel_leaves_uninitialised_reaches_nobody(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], tail: int
) -> None:
    """A kernel may leave rows behind the last offset, and gradients of experts without rows, uninitialised. Here they are
    NaN."""
    real = F.grouped_mm

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight, offsets)
            out = real(x, weight, offs=offsets)
            out[int(offsets[-1]) :] = float("nan")
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, weight, offsets = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
                grad_x, grad_weight = torch.autograd.grad(real(*leaves, offs=offsets), leaves, grads[0])
            grad_x[int(offsets[-1]) :] = float("nan")
            grad_weight[torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0] = float("nan")
            return grad_x, grad_weight, None

    monkeypatch.setattr(experts_file.F, "grouped_mm", lambda x, weight, offs: Poisoned.apply(x, weight, offs))
    arguments = inputs(counts, torch.float32, tail)
    grouped = value_and_gradients(grouped_swiglu, arguments, counts)
    monkeypatch.undo()
    for ours, theirs in zip(grouped, value_and_gradients(loop_swiglu, arguments, counts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(theirs, torch.float32))


def test_an_expert_without_rows_has_a_gradient_of_zeros() -> None:
    x_QD, *stacks = inputs((4, 0, 3), torch.bfloat16)
    grouped_swiglu(x_QD, *stacks, (4, 0, 3)).sum().backward()
    for stack in stacks:
        assert stack.grad is not None
        assert (stack.grad[1] == 0).all()
        assert (stack.grad[0] != 0).any()


@pytest.mark.parametrize(
    ("dtype", "widths", "reason"),
    [
        (torch.float64, (16, 8), "no grouped product in torch.float64"),
        (torch.bfloat16, (16, 12), "must be multiples of 8 in torch.bfloat16, not 12"),
        (torch.float32, (6, 8), "must be multiples of 4 in torch.float32, not 6"),
    ],
)
def test_where_it_is_not_possible_it_says_why(dtype: torch.dtype, widths: tuple[int, int], reason: str) -> None:
    assert reason in str(why_not_grouped(dtype, CPU, widths))
    with refused(ValueError) as raised:
        choose_gemm("grouped", dtype=dtype, device=CPU, widths=widths, num_experts=64)
    assert reason in str(raised.value)
    assert choose_gemm("auto", dtype=dtype, device=CPU, widths=widths, num_experts=64) is loop_swiglu


@pytest.mark.parametrize(("dtype", "odd"), [(torch.bfloat16, 12), (torch.float32, 6), (torch.float16, 4)])
def test_the_rule_is_torchs_own(dtype: torch.dtype, odd: int) -> None:
    """Torch refuses the same shapes as the rule. The test fails if a later torch accepts them."""
    weight = torch.randn(2, 8, odd).to(dtype)
    with refused(RuntimeError):
        F.grouped_mm(torch.randn(4, odd).to(dtype), weight.transpose(-2, -1), offs=torch.tensor([2, 4], dtype=torch.int32))


def test_auto_is_what_was_measured_on_cpu_and_the_kernel_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")

    def auto(device: torch.device, dtype: torch.dtype, num_experts: int) -> object:
        return choose_gemm("auto", dtype=dtype, device=device, widths=(16, 8), num_experts=num_experts)

    assert auto(CPU, torch.bfloat16, GROUPED_ON_CPU - 1) is loop_swiglu
    assert auto(CPU, torch.bfloat16, GROUPED_ON_CPU) is grouped_swiglu
    assert auto(CPU, torch.float64, GROUPED_ON_CPU) is loop_swiglu
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert auto(cuda, torch.bfloat16, 1) is grouped_swiglu
    assert auto(cuda, torch.float32, 64) is loop_swiglu
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert auto(cuda, torch.bfloat16, 64) is loop_swiglu
    assert choose_gemm("loop", dtype=torch.bfloat16, device=cuda, widths=(16, 8), num_experts=64) is loop_swiglu
