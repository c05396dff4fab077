"""Triton kernels for w silu(g) u, where w is the routing weight of a row, and for its gradients. Arithmetic is fp32.

    h = w silu(g) u,   silu(g) = g s,   s = 1 / (1 + exp(-g))
    dg = dh w u s (1 + g (1 - s)),   du = dh w silu(g),   dw = sum over F of dh silu(g) u

Shape letters: Q rows, F hidden width of experts.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import block_of, launch, operation


@triton.jit
def swiglu_kernel(weight, gate, up, out, F: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    g = tl.load(gate + q * F + column, mask=mask).to(tl.float32)
    u = tl.load(up + q * F + column, mask=mask).to(tl.float32)
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
    BLOCK: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + q).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < F
        g = tl.load(gate + q * F + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + q * F + column, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(grad + q * F + column, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        total += dh * (g * s * u)
        dh *= w
        tl.store(grad_gate + q * F + column, (dh * u * (s * (1 + g * (1 - s)))).to(grad_gate.dtype.element_ty), mask=mask)
        tl.store(grad_up + q * F + column, (dh * (g * s)).to(grad_up.dtype.element_ty), mask=mask)
    tl.store(grad_weight + q, tl.sum(total, 0).to(grad_weight.dtype.element_ty))


@operation("swiglu(Tensor weight, Tensor gate, Tensor up) -> Tensor")
def swiglu(weight: Tensor, gate: Tensor, up: Tensor) -> Iterator[Tensor]:
    """Returns h [Q, F] for weights [Q], g and u [Q, F]."""
    out, (num_rows, width) = gate.new_empty(gate.shape), gate.shape
    yield out
    block = block_of(width)
    launch(swiglu_kernel, (num_rows, triton.cdiv(width, block)), weight, gate, up, out, F=width, BLOCK=block)


@operation("swiglu_backward(Tensor grad, Tensor weight, Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)")
def swiglu_backward(grad: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Returns dw [Q], dg and du [Q, F] for dh [Q, F]. One program has a row, so dw needs no atomic sum."""
    out = weight.new_empty(weight.shape), gate.new_empty(gate.shape), up.new_empty(up.shape)
    yield out
    num_rows, width = gate.shape
    launch(swiglu_backward_kernel, (num_rows,), grad, weight, gate, up, *out, F=width, BLOCK=block_of(width))
