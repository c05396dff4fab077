"""Draws random numbers that depend only on a name: integers such as seed and step. So recomputation draws equal numbers.

`logistic` is a counter-based generator: it hashes (seed, step, layer, token, expert) into a number. The generator has no
state to save, so its numbers do not depend on the layout of ranks. `dropped` (dropout) seeds a torch generator with a name,
and draws for all tokens of one rank at once.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_WORD = 0xFFFFFFFF


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function` without keeping its activations: backward computes the activations again. The call saves no random
    state, because every random number of a layer depends only on its name."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def logistic(name: tuple[int, ...], row_T: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns standard logistic noise [T, E]: the difference of two Gumbel(0, 1) variables, for a Gumbel-sigmoid.

    Args:
        name: Identifies the draw, for example (seed, step, layer).
        row_T, columns: int64, the indices of tokens and experts: each (token, expert) has its own random number.
    """
    digest = hashlib.sha256("/".join(str(part) for part in name).encode()).digest()
    low, high = (int.from_bytes(digest[at : at + 4], "big") for at in (0, 4))
    mixed_T = _mix(_mix((row_T & _WORD) ^ low) ^ (row_T >> 32) ^ high)
    bits_TE = _mix(mixed_T[:, None] ^ _mix((columns + 1) & _WORD)[None])  # a temporary int64 [T, E]

    # (24-bit integer + 0.5) / 2^24 is never 0 or 1, and fp64 holds it exactly, so all devices draw the same number.
    uniform_TE = ((bits_TE >> 8).to(torch.float64) + 0.5) / (1 << 24)
    return torch.logit(uniform_TE).to(dtype)


def dropped(x: Tensor, share: float, *, name: tuple[int, ...]) -> Tensor:
    """Applies dropout: sets each element to 0 with probability `share` and divides all others by 1 - share, which keeps the
    expected value. Equal names, for example (seed, step, layer, first token, projection), give equal draws on devices of
    the same type."""
    digest = hashlib.sha256("/".join(str(part) for part in name).encode()).digest()
    generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # a seed must be below 2^63
    kept = torch.empty_like(x, dtype=torch.float32).bernoulli_(1.0 - share, generator=generator)
    return x * (kept / (1.0 - share)).to(x.dtype)


def _mix(word: Tensor) -> Tensor:
    """Mixes 32 bits (in an int64) so that each output bit depends on all input bits (`lowbias32` of C. Wellons)."""
    word = _times(word ^ (word >> 16), 0x7FEB352D)
    word = _times(word ^ (word >> 15), 0x846CA68B)
    return word ^ (word >> 16)


def _times(word: Tensor, factor: int) -> Tensor:
    """Returns the product modulo 2^32. Multiplies by the halves of `factor`, because a whole product overflows int64."""
    return (word * (factor & 0xFFFF) + (((word * (factor >> 16)) & 0xFFFF) << 16)) & _WORD
