"""The experts' products over rows sorted by expert, in two ways with one contract; a third is one more such function.

    swiglu(x_QD, gate, up, down, counts)  ->  y_QD

gate, up [e, F, D] and down [e, D, F] are in the dtype of x; counts, on the host, are each expert's rows, in order. Rows of
x beyond their sum belong to no expert: they have no output and a zero gradient. An expert without rows gets a zero
    gradient, not
None.

What `torch.nn.functional.grouped_mm` of torch 2.13 takes, found by running it on CPU: fp32, bf16 and fp16, in a loop in
C++; offsets in int32; strides in multiples of 16 bytes, so D and F in multiples of 8 (bf16, fp16) or 4 (fp32); no float64.
What lies beyond the last offset stays uninitialised, in the output and in the gradient. On CUDA, by its documentation, the
kernel takes bf16 on compute capability 8.0 and up.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ExpertGemm = Literal["auto", "grouped", "loop"]
ALIGNMENT = 16  # bytes of a stride
GROUPED_ON_CPU = 16  # experts of a group on a rank, from which the loop in C++ was measured to be faster


class StackedSwiGLU(Protocol):
    """See the top of this file."""

    def __call__(self, x_QD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor: ...


def loop_swiglu(x_QD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """One expert after the other; any dtype, device and width. Three products an expert, empty ones included, so that an
    expert without rows has its zero gradient."""
    # unbind, not indexing: the backward of an index would fill a whole stack with zeros for each expert.
    stacks = [weight.unbind() for weight in (gate, up, down)]
    runs = x_QD[: sum(counts)].split(list(counts))
    outputs = [
        F.linear(F.silu(F.linear(run, gate)) * F.linear(run, up), down)
        for run, gate, up, down in zip(runs, *stacks, strict=True)
    ]
    return torch.cat(outputs)


def grouped_swiglu(x_QD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Three grouped products for all experts. Use it where `why_not_grouped` says nothing.

    On CUDA the offsets are copied from the host, a few bytes that are queued and not waited for.
    """
    if not sum(counts):
        return loop_swiglu(x_QD, gate, up, down, counts)  # kernels are not called without a row
    x_QD = x_QD[: sum(counts)]
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(x_QD.device, non_blocking=True)
    empty = [expert for expert, count in enumerate(counts) if not count]
    if empty:
        gate, up, down = (_zero_gradient_of(weight, empty) for weight in (gate, up, down))
    hidden_QF = F.silu(_product(x_QD, gate, offsets)) * _product(x_QD, up, offsets)
    return _ContiguousGradient.apply(_product(hidden_QF, down, offsets))  # pyright: ignore[reportReturnType]


def choose_gemm(
    kind: ExpertGemm, *, dtype: torch.dtype, device: torch.device, widths: Sequence[int], num_experts: int
) -> StackedSwiGLU:
    """The way to compute `num_experts` experts whose D and F are `widths`.

    `auto` is grouped where CUDA has a kernel for it: one launch instead of one an expert. On CPU both are loops, and
    grouped is taken from as many experts on as it was measured to be faster (docs/parallelism.md). Cheap enough to ask in
    each forward.

    Raises:
        ValueError: `grouped` where it is not possible, with the reason.
    """
    few = device.type != "cuda" and num_experts < GROUPED_ON_CPU
    if kind == "loop" or (kind == "auto" and few):
        return loop_swiglu
    reason = why_not_grouped(dtype, device, widths)
    if reason is None:
        return grouped_swiglu
    if kind == "auto":
        return loop_swiglu
    raise ValueError(f"parallel.expert_gemm=grouped: {reason}; take loop or auto (docs/parallelism.md)")


def why_not_grouped(dtype: torch.dtype, device: torch.device, widths: Sequence[int]) -> str | None:
    """Why the grouped product cannot be used, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm, which came with 2.11"
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0)):
        return "on CUDA torch has a grouped kernel for bf16 on compute capability 8.0 and up only"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch has no grouped product in {dtype}"
    odd = [width for width in widths if width * dtype.itemsize % ALIGNMENT]
    if odd:
        step = ALIGNMENT // dtype.itemsize
        return f"hidden_dim and ffn_dim must be multiples of {step} in {dtype}, not {', '.join(map(str, odd))}"
    return None


def _product(x_QI: Tensor, weight_eOI: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x_QI, weight_eOI.transpose(-2, -1), offs=offsets)


class _ContiguousGradient(torch.autograd.Function):
    """Its input; backward lays an expanded gradient out in memory, as the grouped product refuses strides of 0."""

    @staticmethod
    def forward(ctx: Any, y_QD: Tensor) -> Tensor:
        return y_QD.view_as(y_QD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].contiguous()


class _ZeroGradientOf(torch.autograd.Function):
    """The weight itself; backward writes zeros where an expert had no row: no document says what a kernel leaves there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, experts: list[int]) -> Tensor:
        ctx.experts = experts
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grads
        for expert in ctx.experts:  # the product's own fresh buffer, which nobody else holds
            gradient[expert].zero_()
        return gradient, None


def _zero_gradient_of(weight: Tensor, experts: list[int]) -> Tensor:
    return _ZeroGradientOf.apply(weight, experts)  # pyright: ignore[reportReturnType]
