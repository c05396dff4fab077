"""Compares the values and gradients of each Triton kernel with those of torch's operations in float64. Also runs the
trial of the kernels that each training run makes at its start.

Shape letters: Q (token, expert) pairs, R rows, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.kernel_choice import why_not, why_not_triton
from moe_dist.moe.kernels.interface import RowIndex, RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading

SHAPES = ((13, 5, 24), (3, 40, 7), (4, 2, 2056), (1, 1, 1), (0, 3, 8), (0, 0, 8))  # (pairs, rows, width)
LARGE_SHAPES = ((16_384, 4096, 2048), (30_011, 4099, 1000))  # the CPU would take minutes for these in float64
MOST = {torch.float32: 3e-6, torch.bfloat16: 0.01}  # relative differences; a bf16 store rounds (the interpreter truncates)


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of (`found` - `expected`) / the norm of `expected`; 0 for empty tensors."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30)) if found.numel() else 0.0


def kernels(job: CheckJob) -> list[Reading]:
    """Measures the largest relative difference between each kernel and torch, over all shapes, in fp32 and bf16."""
    device, readings = torch.device(job.device), []
    if reason := why_not_triton(device, torch.bfloat16):
        raise NotPossibleError(reason)
    from moe_dist.model.kernels.choice import why_not as why_not_dense
    from moe_dist.model.kernels.triton_kernels import TRITON as DENSE
    from moe_dist.moe.kernels.triton_kernels import TRITON

    for dtype, most in MOST.items():
        if reason := why_not(TRITON, device, dtype) or why_not_dense(DENSE, device, dtype):
            raise AssertionError(reason)
        for name, run in {"gather": _gather, "weighted pairs": _weighted_pairs, "sums of rows": _sum_rows}.items():
            shapes = SHAPES if job.rehearse else (*SHAPES, *LARGE_SHAPES)
            worst = max(_against_torch(TRITON, run, shape, device, dtype) for shape in shapes)
            readings.append(Reading(f"{name}, {str(dtype).removeprefix('torch.')}: difference", worst, most=most))
    return readings


def _against_torch(triton: RowKernels, run: Any, shape: tuple[int, int, int], device: Any, dtype: torch.dtype) -> float:
    """Returns the largest relative difference between the results and gradients of `run` and those of torch in float64."""
    num_pairs, num_rows, width = shape
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, max(1, num_rows), (num_pairs,), generator=generator)
    drawn = [torch.randn(rows, width, generator=generator).to(dtype) for rows in (num_rows, num_pairs, num_pairs)]
    weight_Q = torch.rand(num_pairs, generator=generator)

    def results(kernels: RowKernels, where: torch.device, widened: torch.dtype | None) -> list[Tensor]:
        leaves = [each.to(where, widened or each.dtype, copy=True).requires_grad_() for each in (*drawn, weight_Q)]
        made = run(kernels, RowIndex((index.to(where),), num_rows), *leaves)
        directions = [torch.cos(torch.arange(each.numel())).view(each.shape).to(each) for each in made]
        wanted = [each for each in made if each.requires_grad]
        given = [direction for each, direction in zip(made, directions, strict=True) if each.requires_grad]
        grads = torch.autograd.grad(wanted, leaves, given, allow_unused=True) if wanted else []
        return [*made, *(each for each in grads if each is not None)]

    exact = results(TORCH, torch.device("cpu"), torch.float64)
    return max(map(difference, results(triton, device, None), exact))


def _gather(kernels: RowKernels, index: RowIndex, rows_RD: Tensor, *_: Tensor) -> list[Tensor]:
    return [each * 1 for each in kernels.gather(rows_RD, index)]


def _weighted_pairs(kernels: RowKernels, index: RowIndex, _: Tensor, gate: Tensor, up: Tensor, w: Tensor) -> list[Tensor]:
    hidden_QD = kernels.swiglu(w, gate, up)
    return [kernels.sum_pairs(hidden_QD, w, index, hidden_QD.dtype)]


def _sum_rows(kernels: RowKernels, index: RowIndex, base: Tensor, own: Tensor, other: Tensor, w: Tensor) -> list[Tensor]:
    both = RowIndex((*index.parts, *index.parts), index.num_rows)
    with torch.no_grad():
        return [kernels.sum_rows(own, lambda: other, both, base)]
