"""Frequencies of rotary positions (RoFormer, arXiv 2104.09864), and their scalings for longer sequences.

A scaling is a function of the head width d, the base, and the positions int64 [B, S] (0 for padding). It returns
frequencies and a factor by which cosines and sines are multiplied. The frequencies are fp32 [d / 2], or [B, 1, 1, d / 2] if
they differ between sequences. Shape letters: B sequences, S positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RopeScaling = Callable[[int, float, Tensor], tuple[Tensor, float]]


def frequencies(head_dim: int, base: float | Tensor, positions_BS: Tensor) -> Tensor:
    """Returns base^(-2 i / d), i = 0 ... d / 2 - 1, in fp32, because in bf16 neighbouring angles would be equal."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    return base**-exponents


@dataclass(frozen=True)
class LinearScaling:
    """Divides all frequencies by the factor (arXiv 2306.15595)."""

    factor: float

    def __call__(self, head_dim: int, base: float, positions_BS: Tensor) -> tuple[Tensor, float]:
        return frequencies(head_dim, base, positions_BS) / self.factor, 1.0


@dataclass(frozen=True)
class DynamicScaling:
    """Changes the base to base (f n / L - f + 1)^(d / (d - 2)) if the longest document of a sequence has n > L tokens.
    L is the original length, f the factor.

    transformers, in contrast, computes one n for the whole batch, and keeps the largest n so far until a batch has n < L.
    This class computes n for each sequence.
    """

    factor: float
    original_max_position_embeddings: int

    def __call__(self, head_dim: int, base: float, positions_BS: Tensor) -> tuple[Tensor, float]:
        longest_B1 = positions_BS.amax(-1, keepdim=True).to(torch.float32) + 1  # no host sync
        grown_B1 = (self.factor * longest_B1 / self.original_max_position_embeddings - self.factor + 1).clamp(min=1.0)
        base_B111 = (base * grown_B1 ** (head_dim / (head_dim - 2)))[..., None, None]
        return frequencies(head_dim, base_B111, positions_BS), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """Keeps high frequencies, divides low ones by the factor, and ramps in between (arXiv 2309.00071, eq. 17 to 23)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __call__(self, head_dim: int, base: float, positions_BS: Tensor) -> tuple[Tensor, float]:
        plain = frequencies(head_dim, base, positions_BS)
        low, high = (self._index(rotations, head_dim, base) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (torch.arange(len(plain), device=plain.device) - low) / ((high - low) or 0.001)
        divided = ramp.clamp(0, 1)
        return plain / self.factor * divided + plain * (1 - divided), self._size()

    def _index(self, rotations: float, head_dim: int, base: float) -> float:
        """Returns the fractional index of the frequency that makes `rotations` full turns over the original length."""
        wave = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(base))

    def _size(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self.size(self.mscale) / self.size(self.mscale_all_dim)
        return self.size(1.0)

    def size(self, scale: float) -> float:
        """Returns YaRN's multiplier of queries or keys: 0.1 scale ln(factor) + 1, or 1 if the factor is at most 1."""
        return 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Divides low frequencies by the factor, and keeps high frequencies, with a linear ramp between (Llama 3.1)."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __call__(self, head_dim: int, base: float, positions_BS: Tensor) -> tuple[Tensor, float]:
        plain = frequencies(head_dim, base, positions_BS)
        rotations = plain * (self.original_max_position_embeddings / (2 * math.pi))
        kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept, 1.0
