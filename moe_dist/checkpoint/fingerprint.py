"""Computes a tensor's fingerprint, which does not depend on the tensor's sharding. It is a sum of one hash per element,
over the element's bits and position.

    fingerprint = sum over elements i of mix(bits_i + (i + 1) * G)  mod 2^64

Here i counts the elements of the whole tensor in row-major order, bits_i is the element's bit pattern (sign extended to 64
bits), and G is odd. mix is the 64-bit finaliser of MurmurHash3 (public domain), a bijection. Because the hashes are only
added, the fingerprints of disjoint pieces add up to the fingerprint of the whole tensor. The sum depends neither on how the
tensor is divided, nor on the order of the pieces, nor on the device.

A change of one element always changes the fingerprint. A change of several elements leaves the fingerprint unchanged with
probability 2^-64. The fingerprint detects accidental damage, but no attacks: a tensor with a given fingerprint can be
constructed.

A fingerprint costs one pass over the tensor. One CPU core processes about 1 GB of fp32 per second.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_G, _M1, _M2 = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_MASK33 = (1 << 31) - 1  # clears the sign bits that `>>` of an int64 by 33 shifts in
_BLOCK = 1 << 15  # elements per block; a block of int64 has 256 KiB, which fit into a CPU core's cache
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(piece: Tensor, *, offsets: Sequence[int] = (), shape: Sequence[int] | None = None) -> int:
    """Returns the fingerprint (0 to 2^64 - 1) of a box of a tensor. A box is a contiguous range of indices in each dim.
    Costs one device sync.

    Args:
        piece: The elements of the box, as a plain tensor with 1, 2, 4 or 8 bytes per element.
        offsets: Index of the box's first element in each dim of the whole tensor; by default zeros.
        shape: Shape of the whole tensor; by default the shape of `piece`.
    """
    whole = tuple(piece.shape if shape is None else shape)
    total = torch.zeros((), dtype=torch.int64, device=piece.device)  # on the device, so that the loop does not sync
    # `keys` has i * G for the positions i inside a block. To each block, the loop adds (position of the block + 1) * G.
    keys = torch.arange(min(_BLOCK, max(1, piece.numel())), dtype=torch.int64, device=piece.device).mul_(signed(_G))
    flat = piece.detach().contiguous().reshape(-1)  # copies only a non-contiguous piece
    bits = flat.view(_BITS[flat.element_size()])  # bit patterns: -0.0 differs from 0.0, and NaN equals itself
    for begin, place, length in _runs(tuple(piece.shape), tuple(offsets) or (0,) * piece.ndim, whole):
        for at in range(0, length, _BLOCK):
            part = bits[begin + at : begin + min(at + _BLOCK, length)]
            x = part.to(torch.int64, copy=True)  # always copies, because the next lines change `x` in place
            x.add_(keys[: x.numel()]).add_(signed((place + at + 1) * _G))
            x.bitwise_xor_((x >> 33).bitwise_and_(_MASK33)).mul_(signed(_M1))
            x.bitwise_xor_((x >> 33).bitwise_and_(_MASK33)).mul_(signed(_M2))
            total += x.bitwise_xor_((x >> 33).bitwise_and_(_MASK33)).sum()
    return int(total) % (1 << 64)  # device-to-host sync


def hexadecimal(value: int) -> str:
    """Formats a fingerprint as 16 hex digits, as it is stored in checkpoints."""
    return f"{value % (1 << 64):016x}"


def _runs(box: tuple[int, ...], offsets: tuple[int, ...], whole: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yields (index of the first element in the box, its index in the whole tensor, number of elements) for each range of
    elements that is contiguous in both the box and the whole tensor."""
    if not math.prod(box):
        return
    cut = max((d for d in range(len(whole)) if box[d] != whole[d]), default=0)  # last dim that the box does not fill
    inner = math.prod(box[cut:])
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    for run in range(math.prod(box[:cut])):
        place, rest = base, run
        for d in reversed(range(cut)):
            rest, index = divmod(rest, box[d])
            place += index * strides[d]
        yield run * inner, place, inner


def signed(value: int) -> int:
    """Returns the int64 with the bits of the unsigned `value`. Sums of int64 wrap modulo 2^64, like fingerprints."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
