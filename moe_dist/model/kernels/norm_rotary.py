"""Triton kernels for RMSNorm, for the rotary embedding, and for a norm of queries or keys with the rotation after it in one
pass. Arithmetic is fp32. Normed values are not rounded before their rotation.

    y = x r w,   r = 1 / sqrt(mean over D of x^2 + eps)
    dx = r w dy - x r^3 mean over D of (w dy x),   dw = sum over rows of dy x r
    first' = first cos - second sin,   second' = second cos + first sin

The gradient of a rotation is the rotation by the negative angles. Backward computes r again. Each program sums dw over its
rows in registers. One more pass adds the sums of all programs, so nothing is added atomically.

A program has all heads of a token in registers. A norm without rotation treats several rows as the heads of one token.
Shape letters: T tokens, H heads, d head width, D width of the norm, M rows (T H), P programs.
"""

# pyright: reportArgumentType=false
# Triton's type annotations do not describe kernels.
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import launch, operation

TILE = 1024  # number of pairs of values that a program of 4 warps has in registers, for rows of at most this many pairs
LARGEST = 8192  # widest norm whose values a program keeps in registers
PROGRAMS = 512  # number of programs of the backward kernel, about 4 per multiprocessor of an H100


@triton.jit
def places(
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr
):
    """Returns four blocks. For each pair of values they have: its head, its index in the head, the index of its first value
    in the token, and whether it exists."""
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    return head, pair, head * D + pair * STEP, (head < H) & (pair < HALF)


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
def norm_rotary_kernel(
    x, weight, cos, sin, out, wide, eps, M,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, FAR: tl.constexpr, SIGN: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head, pair, at, mask = places(H, D, HALF, STEP, HEADS, PAIRS)
    here = t * H + head < M
    mask &= here
    start = t * H * D + at
    first = tl.load(x + start, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + start + FAR, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        of_weight = at if WHOLE else pair * STEP + tl.zeros_like(at)
        r = 1 / tl.sqrt(mean_of(first * first + second * second, H, D, WHOLE) + eps)
        first *= r * tl.load(weight + of_weight, mask=mask, other=0.0).to(tl.float32)
        second *= r * tl.load(weight + of_weight + FAR, mask=mask, other=0.0).to(tl.float32)
    if ROTATE:
        c = tl.load(cos + t * HALF + pair, mask=pair < HALF, other=0.0)
        s = tl.load(sin + t * HALF + pair, mask=pair < HALF, other=0.0) * SIGN
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    first = first.to(out.dtype.element_ty)
    second = second.to(out.dtype.element_ty)
    tl.store(out + start, first, mask=mask)
    tl.store(out + start + FAR, second, mask=mask)
    if WIDE:
        tl.store(wide + start, first.to(tl.float32), mask=mask)
        tl.store(wide + start + FAR, second.to(tl.float32), mask=mask)
    if REST > 0:  # copies the values that do not rotate
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        kept = (head < H) & here & (column < D)
        rest = t * H * D + head * D + column
        tl.store(out + rest, tl.load(x + rest, mask=kept), mask=kept)


@triton.jit
def norm_rotary_backward_kernel(
    grad, grad_wide, x, weight, cos, sin, out, sums, eps, M, steps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, FAR: tl.constexpr,
    ROTATE: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    head, pair, at, here = places(H, D, HALF, STEP, HEADS, PAIRS)
    of_weight = at if WHOLE else pair * STEP + tl.zeros_like(at)
    first_weight = tl.load(weight + of_weight, mask=here, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + of_weight + FAR, mask=here, other=0.0).to(tl.float32)
    first_total = tl.zeros((HEADS, PAIRS), tl.float32)
    second_total = tl.zeros((HEADS, PAIRS), tl.float32)
    for step in range(steps):
        t = tl.program_id(0).to(tl.int64) * steps + step
        mask = here & (t * H + head < M)
        start = t * H * D + at
        first_dy = tl.load(grad + start, mask=mask, other=0.0).to(tl.float32)
        second_dy = tl.load(grad + start + FAR, mask=mask, other=0.0).to(tl.float32)
        if WIDE:
            first_dy += tl.load(grad_wide + start, mask=mask, other=0.0)
            second_dy += tl.load(grad_wide + start + FAR, mask=mask, other=0.0)
        if ROTATE:
            known = (pair < HALF) & (t * H + tl.zeros_like(pair) < M)  # blocks: Triton's interpreter has no scalar masks
            c = tl.load(cos + t * HALF + pair, mask=known, other=0.0)
            s = tl.load(sin + t * HALF + pair, mask=known, other=0.0)
            turned = first_dy * c + second_dy * s
            second_dy = second_dy * c - first_dy * s
            first_dy = turned
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
        tl.store(own, tl.sum(first_total, 0)[None, :], mask=pair < HALF)
        tl.store(own + FAR, tl.sum(second_total, 0)[None, :], mask=pair < HALF)


@operation(
    "norm_rotary(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps, bool adjacent, bool back, bool wide) "
    "-> Tensor[]"
)
def norm_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    adjacent: bool,
    back: bool,
    wide: bool,
) -> Iterator[list[Tensor]]:
    """Returns the normed and rotated x [T, H, d]; with `wide` also this result in fp32.

    With weights [H d] the norm is over all heads together, with weights [d] over each head; None: no norm. `cos` and `sin`
    are fp32 [T, r / 2]; None: no rotation. The first r values of each head rotate, with `back` by the negative angles; a
    norm needs r = d. Pairs are 2 i and 2 i + 1 if `adjacent`, else i and i + r / 2.
    """
    out = [torch.empty_like(x)]
    if wide:
        out.append(torch.empty_like(x, dtype=torch.float32))
    yield out
    given = sizes(x, weight, cos, adjacent)
    rest = x.shape[2] - 2 * given["HALF"]
    flags = {"NORM": weight is not None, "WIDE": wide, "SIGN": -1.0 if back else 1.0}
    flags["REST"] = triton.next_power_of_2(rest) if rest else 0
    pointers = [x if each is None else each for each in (weight, cos, sin)]
    rows = x.shape[0] * x.shape[1]
    grid = (triton.cdiv(rows, given["H"]),)
    launch(norm_rotary_kernel, grid, x, *pointers, out[0], out[-1], eps, rows, **given, **flags)


@operation(
    "norm_rotary_backward(Tensor grad, Tensor? grad_wide, Tensor x, Tensor weight, Tensor? cos, Tensor? sin, float eps, "
    "bool adjacent) -> (Tensor, Tensor)"
)
def norm_rotary_backward(
    grad: Tensor,
    grad_wide: Tensor | None,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    adjacent: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns dx, and each program's part of the weights' gradient: the sum over its rows, fp32 [P, H d] or [P, d]. The
    gradient of the result is `grad`, plus `grad_wide` (fp32) if given."""
    given, rows = sizes(x, weight, cos, adjacent), x.shape[0] * x.shape[1]
    tiles = triton.cdiv(rows, given["H"])
    steps = triton.cdiv(tiles, PROGRAMS)
    programs = triton.cdiv(tiles, max(1, steps))
    out, sums = torch.empty_like(x), x.new_empty((programs, len(weight)), dtype=torch.float32)
    yield out, sums
    wide, *tables = (grad if each is None else each for each in (grad_wide, cos, sin))
    inputs = (grad, wide, x, weight, *tables, out, sums, eps, rows, steps)
    launch(norm_rotary_backward_kernel, (programs,), *inputs, WIDE=grad_wide is not None, **given)


def sizes(x: Tensor, weight: Tensor | None, cos: Tensor | None, adjacent: bool) -> dict[str, Any]:
    """Returns the constants of both kernels, and the number of warps. A thread gets at most 8 pairs, unless the most warps
    of a block (32) are too few. STEP and FAR are the distances between the first values of neighbouring pairs, and between
    a pair's two values."""
    _, heads, width = x.shape
    half = width // 2 if cos is None else cos.shape[-1]
    pairs = triton.next_power_of_2(half)
    rows = heads if cos is not None else max(1, TILE // pairs)
    blocks = {"HEADS": triton.next_power_of_2(rows), "PAIRS": pairs}
    warps = min(32, max(4, blocks["HEADS"] * triton.next_power_of_2(width // 2) // 256))
    whole = cos is not None and weight is not None and len(weight) == heads * width
    shape = {"H": rows, "D": width, "HALF": half, "STEP": 1 + adjacent, "FAR": 1 if adjacent else half}
    return {**shape, "ROTATE": cos is not None, "WHOLE": whole, **blocks, "num_warps": warps}
