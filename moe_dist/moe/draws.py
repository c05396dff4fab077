"""Random numbers that depend only on names: the same in any order and on every call.

`logistic` is a counter-based generator: the number for (seed, step, layer; token, expert) is a hash of these. So there is
no state to save, recomputation draws the same numbers as the first forward, and any layout of ranks draws the same.
`dropped` (dropout) seeds a generator by a name, for one rank's tokens at once.
"""

import hashlib

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def logistic(name: tuple[int, ...], row_T: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard logistic noise [T, E]: the difference of two independent Gumbel(0, 1), as Gumbel-sigmoid adds it.

    Args:
        name: What the draw is for, as (seed, step, layer).
        row_T, columns: int64, the numbers of the tokens and of the experts; each pair has a draw of its own.
    """
    digest = hashlib.sha256("/".join(str(part) for part in name).encode()).digest()
    low, high = (int.from_bytes(digest[at : at + 4], "big") for at in (0, 4))
    mixed_T = _mix(_mix((row_T & _WORD) ^ low) ^ (row_T >> 32) ^ high)
    bits_TE = _mix(mixed_T[:, None] ^ _mix((columns + 1) & _WORD)[None])
    # 24 bits and a half: never 0 or 1, and exact in fp32, so that every device and dtype sees the same uniform number.
    uniform_TE = ((bits_TE >> 8).to(torch.float64) + 0.5) / (1 << 24)
    return torch.logit(uniform_TE).to(dtype)


def dropped(x: Tensor, share: float, *, name: tuple[int, ...]) -> Tensor:
    """x with a share of its elements set to 0 and the others divided by 1 - share, so that the mean stays. Equal names give
    equal draws on one kind of device.

    Args:
        name: Identifies the draw, as (seed, step, layer, first token, projection).
    """
    digest = hashlib.sha256("/".join(str(part) for part in name).encode()).digest()
    generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    kept = torch.empty_like(x, dtype=torch.float32).bernoulli_(1.0 - share, generator=generator)
    return x * (kept / (1.0 - share)).to(x.dtype)


def _mix(word: Tensor) -> Tensor:
    """32 bits to 32 bits, each of which depends on all (the finaliser `lowbias32` of C. Wellons), in int64."""
    word = _times(word ^ (word >> 16), 0x7FEB352D)
    word = _times(word ^ (word >> 15), 0x846CA68B)
    return word ^ (word >> 16)


def _times(word: Tensor, factor: int) -> Tensor:
    """Product modulo 2^32 in two halves, so that no product leaves int64."""
    return (word * (factor & 0xFFFF) + (((word * (factor >> 16)) & 0xFFFF) << 16)) & _WORD
