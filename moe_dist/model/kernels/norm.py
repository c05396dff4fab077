"""Triton kernels for RMSNorm and its gradients. Arithmetic is fp32.

    y = x r w,   r = 1 / sqrt(mean over D of x^2 + eps)
    dx = r w dy - x r^3 mean over D of (w dy x),   dw = sum over rows of dy x r

Backward computes r again. Each program sums dw over its rows in registers. One more pass adds the sums of all programs, so
nothing is added atomically. Shape letters: M rows, D width, P programs.
"""

# pyright: reportArgumentType=false
# Triton's type annotations do not describe kernels.
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import launch, operation

TILE = 1024  # number of values that a program of 4 warps has in registers, for rows of at most this width
LARGEST = 8192  # widest row whose values a program keeps in registers
PROGRAMS = 512  # number of programs of the backward kernel, about 4 per multiprocessor of an H100


@triton.jit
def rms_norm_kernel(
    x, weight, out, wide, eps, M, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < M) & (column < D)
    values = tl.load(x + row * D + column, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(values * values, 1) / D + eps)
    rounded = (values * r[:, None] * w).to(out.dtype.element_ty)
    tl.store(out + row * D + column, rounded, mask=mask)
    if WIDE:
        tl.store(wide + row * D + column, rounded.to(tl.float32), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    grad,
    grad_wide,
    x,
    weight,
    out,
    sums,
    eps,
    M,
    steps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        row = ((tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < M) & (column < D)
        values = tl.load(x + row * D + column, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * D + column, mask=mask, other=0.0).to(tl.float32)
        if WIDE:
            dy += tl.load(grad_wide + row * D + column, mask=mask, other=0.0)
        r = (1 / tl.sqrt(tl.sum(values * values, 1) / D + eps))[:, None]
        values *= r
        total += dy * values
        dy *= w
        dx = r * (dy - values * (tl.sum(dy * values, 1) / D)[:, None])
        tl.store(out + row * D + column, dx.to(out.dtype.element_ty), mask=mask)
    own = tl.sum(total, 0)[None, :]
    tl.store(sums + tl.program_id(0) * D + column, own, mask=column < D)


@operation("rms_norm(Tensor x, Tensor weight, float eps, bool wide) -> Tensor[]")
def rms_norm(x: Tensor, weight: Tensor, eps: float, wide: bool) -> Iterator[list[Tensor]]:
    """Returns y [M, D] from x [M, D] and the weights [D]. With `wide`, also returns y in fp32."""
    out, (rows, width) = [torch.empty_like(x)], x.shape
    if wide:
        out.append(torch.empty_like(x, dtype=torch.float32))
    yield out
    sizes, grid = blocks(width), (triton.cdiv(rows, blocks(width)["ROWS"]),)
    launch(rms_norm_kernel, grid, x, weight, out[0], out[-1], eps, rows, D=width, WIDE=wide, **sizes)


@operation("rms_norm_backward(Tensor grad, Tensor? grad_wide, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
def rms_norm_backward(
    grad: Tensor, grad_wide: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns dx [M, D], and each program's part of dw, fp32 [P, D]. dy is `grad`, plus `grad_wide` (fp32) if given."""
    (rows, width), sizes = x.shape, blocks(x.shape[1])
    tiles = triton.cdiv(rows, sizes["ROWS"])
    steps = triton.cdiv(tiles, PROGRAMS)
    programs = triton.cdiv(tiles, max(1, steps))
    out, sums = torch.empty_like(x), x.new_empty((programs, width), dtype=torch.float32)
    yield out, sums
    wide = grad_wide is not None
    inputs = (grad, grad_wide if wide else grad, x, weight, out, sums, eps, rows, steps)
    launch(rms_norm_backward_kernel, (programs,), *inputs, D=width, WIDE=wide, **sizes)


def blocks(width: int) -> dict[str, int]:
    """Returns the numbers of rows, columns and warps of a program's tile. A thread has at most 16 values of a tile."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": max(4, block // 512)}
