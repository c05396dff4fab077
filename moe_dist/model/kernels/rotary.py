"""A Triton kernel that rotates pairs of values in each head, in one pass over all heads of a token. Arithmetic is fp32.

    first' = first cos - second sin,   second' = second cos + first sin

The gradient is the rotation by the negative angles. Shape letters: T tokens, H heads, d head width.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import block_of, launch, operation


@triton.jit
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    STEP: tl.constexpr,
    FAR: tl.constexpr,
    SIGN: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    head = (t * H + tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    inside = head < (t + 1) * H
    pair = tl.arange(0, PAIRS)
    c = tl.load(cos + t * HALF + pair, mask=pair < HALF)[None, :]
    s = tl.load(sin + t * HALF + pair, mask=pair < HALF)[None, :] * SIGN
    at = head * D + pair[None, :] * STEP
    mask = inside & (pair < HALF)[None, :]
    first = tl.load(x + at, mask=mask).to(tl.float32)
    second = tl.load(x + at + FAR, mask=mask).to(tl.float32)
    tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + FAR, (second * c + first * s).to(out.dtype.element_ty), mask=mask)
    if 2 * HALF < D:  # copies the values that do not rotate
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        kept = inside & (column < D)
        tl.store(out + head * D + column, tl.load(x + head * D + column, mask=kept), mask=kept)


@operation("rotate(Tensor x, Tensor cos, Tensor sin, bool adjacent, bool back) -> Tensor")
def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool, back: bool) -> Iterator[Tensor]:
    """Returns x [T, H, d] rotated by the angles of the tables, fp32 [T, r / 2], or with `back` by the negative angles. The
    first r values of each head rotate. Pairs are 2 i and 2 i + 1 if `adjacent`, else i and i + r / 2."""
    out = torch.empty_like(x)
    yield out
    (tokens, heads, width), half = x.shape, cos.shape[1]
    pairs = triton.next_power_of_2(half)
    together = max(1, min(triton.next_power_of_2(heads), block_of(width * heads) // pairs))
    blocks = {"HEADS": together, "PAIRS": pairs, "REST": triton.next_power_of_2(max(1, width - 2 * half))}
    sizes = {"H": heads, "D": width, "HALF": half, "SIGN": -1.0 if back else 1.0, **layout(half, adjacent)}
    launch(rotate_kernel, (tokens, triton.cdiv(heads, together)), x, cos, sin, out, **sizes, **blocks)


def layout(half: int, adjacent: bool) -> dict[str, int]:
    """Returns two distances for `half` pairs: between the first values of neighbouring pairs, and between a pair's two
    values."""
    return {"STEP": 2, "FAR": 1} if adjacent else {"STEP": 1, "FAR": half}
