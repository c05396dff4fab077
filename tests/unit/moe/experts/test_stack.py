"""Stacks of experts equal their formula, for every activation, adapter and storage, with grouped products or with one
product per expert."""

from itertools import product
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.experts import products
from moe_dist.moe.experts.activations import SWIGLU, Activation, ClampedSwiGLU
from moe_dist.moe.experts.expert_lora import ExpertLoRA
from moe_dist.moe.experts.experts import GROUPED_ON_CPU, ExpertStack, Runs, choose_gemm
from moe_dist.moe.experts.products import why_not_grouped
from moe_dist.moe.experts.static_storage import DeviceRuns
from tests.support.messages import refused

CPU = torch.device("cpu")
D, F_, RANK, SCALE, PADDING = 16, 8, 4, 1.5, 3
COUNTS = {
    "even": (3, 3, 3),
    "empty first": (0, 4, 3),
    "empty middle": (4, 0, 3),
    "empty last": (2, 5, 0),
    "none": (0, 0, 0),
}
CLAMPED = ClampedSwiGLU(alpha=1.3, limit=0.4)
ACTIVATIONS: dict[str, Activation] = {"swiglu": SWIGLU, "clamped": CLAMPED}
ADAPTERS = {
    "none": None,
    "own": ExpertLoRA(RANK, RANK * SCALE),
    "shared": ExpertLoRA(RANK, RANK * SCALE, shared=True),
    "down": ExpertLoRA(RANK, RANK * SCALE, targets=("down",)),
}
GEMMS = {"loop": (torch.float64, 1e-9), "grouped": (torch.float32, 2e-4)}


def make(
    activation: Activation,
    adapter: ExpertLoRA | None,
    gemm: Literal["loop", "grouped"],
    dtype: torch.dtype,
    experts: int = 3,
) -> ExpertStack:
    torch.manual_seed(0)
    stack = ExpertStack(D, F_, experts, gemm=gemm, activation=activation, adapter=adapter).to(dtype)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return stack


def runs_of(counts: tuple[int, ...], storage: str) -> Runs:
    if storage == "host":
        return Runs(counts)
    lengths = torch.tensor(counts)
    return DeviceRuns(lengths, lengths.cumsum(0).to(torch.int32), sum(counts) + PADDING)


def by_formula(stack: ExpertStack, x_QD: Tensor, counts: tuple[int, ...]) -> Tensor:
    named, outputs = dict(stack.named_parameters()), []
    for expert, run in enumerate(x_QD[: sum(counts)].split(counts)):

        def of(name: str, expert: int = expert) -> Tensor:
            return named[name][expert]

        def lora(target: str, expert: int = expert) -> Tensor | float:
            if f"{target}_a" in named:
                return SCALE * named[f"{target}_b"][expert] @ named[f"{target}_a"][expert]
            shared = f"adapters.{target}"
            return SCALE * named[f"{shared}.b"] @ named[f"{shared}.a"] if f"{shared}.a" in named else 0.0

        both = torch.cat([of("gate"), of("up")]) + lora("gate_up")
        gate, up = run @ both[:F_].T, run @ both[F_:].T
        if stack.activation is CLAMPED:
            gate = torch.minimum(gate + of("gate_bias"), torch.tensor(CLAMPED.limit, dtype=gate.dtype))
            up = torch.clamp(up + of("up_bias"), -CLAMPED.limit, CLAMPED.limit)
            hidden = gate / (1 + (-CLAMPED.alpha * gate).exp()) * (up + 1)
        else:
            hidden = gate / (1 + (-gate).exp()) * up
        y = hidden @ (of("down") + lora("down")).T
        outputs.append(y + of("down_bias") if stack.activation is CLAMPED else y)
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("gemm", GEMMS)
def test_every_composition_equals_its_formula(gemm: Any, storage: str, counts: tuple[int, ...]) -> None:
    """Values and all gradients are equal. An expert without rows has gradients of zeros, not None."""
    dtype, bound = GEMMS[gemm]
    runs = runs_of(counts, storage)
    for activation, adapter in product(ACTIVATIONS.values(), ADAPTERS.values()):
        if storage == "device" and adapter is not None and adapter.shared:
            continue  # the configuration refuses it
        stack = make(activation, adapter, gemm, dtype)
        x = torch.randn(runs.num_rows, D, dtype=dtype, requires_grad=True)
        direction, found = torch.randn(sum(counts), D, dtype=dtype), []
        for y in (stack(x, runs)[: sum(counts)], by_formula(stack, x, counts)):
            gradients = torch.autograd.grad((y * direction).sum(), [x, *stack.parameters()])
            found.append((y, tuple(each[: sum(counts)] if n == 0 else each for n, each in enumerate(gradients))))
        torch.testing.assert_close(found[0], found[1], rtol=bound, atol=bound)
        for expert in (expert for expert, count in enumerate(counts) if not count):
            assert not found[0][1][1][expert].any()


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS.values() if 0 in counts and any(counts)], ids=str)
def test_what_a_kernel_leaves_uninitialised_reaches_nobody(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], storage: str
) -> None:
    """A kernel may leave some memory uninitialised: rows after the last offset, and gradients of experts without rows. Here
    this memory is NaN."""
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

    monkeypatch.setattr(products.F, "grouped_mm", lambda x, weight, offs: Poisoned.apply(x, weight, offs))
    stack, runs = make(SWIGLU, None, "grouped", torch.float32), runs_of(counts, storage)
    x = torch.randn(runs.num_rows, D, requires_grad=True)
    stack(x, runs)[: sum(counts)].sum().backward()
    for gradient in (each.grad for each in stack.parameters()):
        assert gradient.isfinite().all()
    assert x.grad[: sum(counts)].isfinite().all()


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
    assert not choose_gemm("auto", dtype=dtype, device=CPU, widths=widths, num_experts=64)


def test_auto_is_what_was_measured_on_cpu_and_the_kernel_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")

    def grouped(device: torch.device, dtype: torch.dtype, num_experts: int, kind: Any = "auto") -> bool:
        return choose_gemm(kind, dtype=dtype, device=device, widths=(16, 8), num_experts=num_experts)

    assert not grouped(CPU, torch.bfloat16, GROUPED_ON_CPU - 1)
    assert grouped(CPU, torch.bfloat16, GROUPED_ON_CPU)
    assert not grouped(CPU, torch.float64, GROUPED_ON_CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert grouped(cuda, torch.bfloat16, 1)
    assert not grouped(cuda, torch.float32, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert not grouped(cuda, torch.bfloat16, 64)
    assert not grouped(cuda, torch.bfloat16, 64, "loop")
