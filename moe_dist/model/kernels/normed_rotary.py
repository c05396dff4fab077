"""Triton kernels that compute the RMSNorm of queries or keys and the rotary embedding after it in one pass instead of two,
and their gradients. `norm.py` and `rotary.py` have the formulas. Normed values are not rounded before their rotation.

A program has all heads of a token in registers. Shape letters: T tokens, H heads, d head width, P programs.
"""

# pyright: reportArgumentType=false
# Triton's type annotations do not describe kernels.
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.model.kernels import norm
from moe_dist.model.kernels.rotary import layout
from moe_dist.moe.kernels.operation import launch, operation


@triton.jit
def places(H: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Returns three blocks: the index of each pair's first value in a token, whether the pair exists, and its index in the
    head."""
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    return head * D + pair * STEP, (head < H) & (pair < D // 2), pair


@triton.jit
def mean_of(values, H: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Returns means of a token's values. `values` [HEADS, PAIRS] has the sum of each pair of values. With WHOLE the result
    is one mean over the H D values of all heads, else a mean over the D values of each head. The result broadcasts over
    PAIRS."""
    sums = tl.sum(values, 1)
    if WHOLE:
        return tl.zeros_like(sums)[:, None] + tl.sum(sums, 0) / (H * D)
    return sums[:, None] / D


@triton.jit
def normed_rotary_kernel(
    x,
    weight,
    cos,
    sin,
    out,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    FAR: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    at, mask, pair = places(H, D, STEP, HEADS, PAIRS)
    of_weight = at if WHOLE else pair * STEP + tl.zeros_like(at)
    first = tl.load(x + t * H * D + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + t * H * D + at + FAR, mask=mask, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(mean_of(first * first + second * second, H, D, WHOLE) + eps)
    first *= r * tl.load(weight + of_weight, mask=mask, other=0.0).to(tl.float32)
    second *= r * tl.load(weight + of_weight + FAR, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + t * (D // 2) + pair, mask=pair < D // 2, other=0.0)
    s = tl.load(sin + t * (D // 2) + pair, mask=pair < D // 2, other=0.0)
    tl.store(out + t * H * D + at, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + t * H * D + at + FAR, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def normed_rotary_backward_kernel(
    grad,
    x,
    weight,
    cos,
    sin,
    out,
    sums,
    eps,
    T,
    steps,
    H: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    FAR: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    at, here, pair = places(H, D, STEP, HEADS, PAIRS)
    of_weight = at if WHOLE else pair * STEP + tl.zeros_like(at)
    first_weight = tl.load(weight + of_weight, mask=here, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + of_weight + FAR, mask=here, other=0.0).to(tl.float32)
    first_total = tl.zeros((HEADS, PAIRS), tl.float32)
    second_total = tl.zeros((HEADS, PAIRS), tl.float32)
    for step in range(steps):
        t = tl.program_id(0).to(tl.int64) * steps + step
        live = t + tl.zeros_like(pair) < T  # a block, because Triton's interpreter has no scalar masks
        mask = here & live
        start = t * H * D + at
        c = tl.load(cos + t * (D // 2) + pair, mask=live & (pair < D // 2), other=0.0)
        s = tl.load(sin + t * (D // 2) + pair, mask=live & (pair < D // 2), other=0.0)
        first_turned = tl.load(grad + start, mask=mask, other=0.0).to(tl.float32)
        second_turned = tl.load(grad + start + FAR, mask=mask, other=0.0).to(tl.float32)
        first_dy = first_turned * c + second_turned * s
        second_dy = second_turned * c - first_turned * s
        first = tl.load(x + start, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + start + FAR, mask=mask, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(mean_of(first * first + second * second, H, D, WHOLE) + eps)
        first *= r
        second *= r
        first_total += first_dy * first
        second_total += second_dy * second
        first_dy *= first_weight
        second_dy *= second_weight
        mean = mean_of(first_dy * first + second_dy * second, H, D, WHOLE)
        tl.store(out + start, (r * (first_dy - first * mean)).to(out.dtype.element_ty), mask=mask)
        tl.store(out + start + FAR, (r * (second_dy - second * mean)).to(out.dtype.element_ty), mask=mask)
    if WHOLE:
        own = sums + tl.program_id(0) * H * D
        tl.store(own + at, first_total, mask=here)
        tl.store(own + at + FAR, second_total, mask=here)
    else:
        own = sums + tl.program_id(0) * D + pair * STEP
        tl.store(own, tl.sum(first_total, 0)[None, :], mask=pair < D // 2)
        tl.store(own + FAR, tl.sum(second_total, 0)[None, :], mask=pair < D // 2)


@operation("normed_rotary(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, bool adjacent) -> Tensor")
def normed_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool) -> Iterator[Tensor]:
    """Returns the normed and rotated x [T, H, d]. Weights [H d] norm x over all heads together, weights [d] over each head.
    `cos` and `sin` are fp32 [T, d / 2]."""
    out = torch.empty_like(x)
    yield out
    launch(normed_rotary_kernel, x.shape[:1], x, weight, cos, sin, out, eps, **sizes(x, weight, adjacent))


@operation(
    "normed_rotary_backward(Tensor grad, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, bool adjacent) "
    "-> (Tensor, Tensor)"
)
def normed_rotary_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns dx, and each program's part of the weights' gradient: the sum over its tokens, fp32 [P, H d] or [P, d]."""
    steps = triton.cdiv(len(x), norm.PROGRAMS)
    programs = triton.cdiv(len(x), max(1, steps))
    out, sums = torch.empty_like(x), x.new_empty((programs, len(weight)), dtype=torch.float32)
    yield out, sums
    inputs = (grad, x, weight, cos, sin, out, sums, eps, len(x), steps)
    launch(normed_rotary_backward_kernel, (programs,), *inputs, **sizes(x, weight, adjacent))


def sizes(x: Tensor, weight: Tensor, adjacent: bool) -> dict[str, int]:
    """Returns the constants of both kernels, and a number of warps with which each thread has at most 8 pairs."""
    _, heads, width = x.shape
    blocks = {"HEADS": triton.next_power_of_2(heads), "PAIRS": triton.next_power_of_2(width // 2)}
    warps = max(4, blocks["HEADS"] * blocks["PAIRS"] // 256)
    shape = {"H": heads, "D": width, "WHOLE": len(weight) == heads * width}
    return {**shape, **layout(width // 2, adjacent), **blocks, "num_warps": warps}
