"""Triton kernels for w silu(g) u and its gradients. w is the routing weight of a row. All arithmetic is fp32.

    h = w silu(g) u,   silu(g) = g s,   s = 1 / (1 + exp(-g))
    dg = dh w u s (1 + g (1 - s)),   du = dh w silu(g),   dw = sum over F of dh silu(g) u

g and u are two tensors [Q, F], or one tensor [Q, 2 F] that has g in its first F columns and u from column UP = F on. ROW is
the number of columns of these tensors. Shape letters: Q rows, F hidden width of experts.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import block_of, launch, operation


@triton.jit
def swiglu_kernel(weight, gate, up, out, F: tl.constexpr, ROW: tl.constexpr, UP: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    g = tl.load(gate + q * ROW + column, mask=mask).to(tl.float32)
    u = tl.load(up + q * ROW + UP + column, mask=mask).to(tl.float32)
    w = tl.load(weight + q).to(tl.float32)
    tl.store(out + q * F + column, (w * (g * tl.sigmoid(g) * u)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    grad,
    weight,
    gate,
    up,
    grad_weight,
    grad_gate,
    grad_up,
    F: tl.constexpr,
    ROW: tl.constexpr,
    UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + q).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < F
        g = tl.load(gate + q * ROW + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + q * ROW + UP + column, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(grad + q * F + column, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        total += dh * (g * s * u)
        dh *= w
        dg = dh * u * (s * (1 + g * (1 - s)))
        tl.store(grad_gate + q * ROW + column, dg.to(grad_gate.dtype.element_ty), mask=mask)
        tl.store(grad_up + q * ROW + UP + column, (dh * (g * s)).to(grad_up.dtype.element_ty), mask=mask)
    tl.store(grad_weight + q, tl.sum(total, 0).to(grad_weight.dtype.element_ty))


def _layout(gate: Tensor, up: Tensor | None) -> dict[str, int]:
    width = gate.shape[1]
    return {"F": width, "ROW": width, "UP": 0} if up is not None else {"F": width // 2, "ROW": width, "UP": width // 2}


@operation("swiglu(Tensor weight, Tensor gate, Tensor? up) -> Tensor")
def swiglu(weight: Tensor, gate: Tensor, up: Tensor | None) -> Iterator[Tensor]:
    """Returns h [Q, F] from the weights [Q], and from g and u: two tensors [Q, F] or one tensor [Q, 2 F]."""
    layout, num_rows = _layout(gate, up), gate.shape[0]
    out = gate.new_empty((num_rows, layout["F"]))
    yield out
    block = block_of(layout["F"])
    grid = (num_rows, triton.cdiv(layout["F"], block))
    launch(swiglu_kernel, grid, weight, gate, gate if up is None else up, out, **layout, BLOCK=block)


@operation("swiglu_backward(Tensor grad, Tensor weight, Tensor gate, Tensor? up) -> Tensor[]")
def swiglu_backward(grad: Tensor, weight: Tensor, gate: Tensor, up: Tensor | None) -> Iterator[list[Tensor]]:
    """Returns dw [Q], and dg and du as two tensors [Q, F] or one tensor [Q, 2 F]. `grad` is dh [Q, F]. One Triton program
    computes a whole row, so dw needs no atomic sum."""
    out = [each.new_empty(each.shape) for each in (weight, gate, up) if each is not None]
    yield out
    layout = _layout(gate, up)
    inputs = (grad, weight, gate, gate if up is None else up, out[0], out[1], out[-1])
    launch(swiglu_backward_kernel, gate.shape[:1], *inputs, **layout, BLOCK=block_of(layout["F"]))
