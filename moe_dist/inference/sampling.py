"""Draws the next token of each sequence from logits, with temperature and nucleus sampling.

Shape letters: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing tokens.

    Attributes:
        temperature: Divisor of the logits. With 0 the most likely token is always taken.
        top_p: Only tokens in the nucleus are drawn: the smallest set of likeliest tokens whose probabilities, after the
            temperature, sum to at least `top_p` (Holtzman et al., arXiv 1904.09751, section 3.1). 1 allows all tokens.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature}: must be 0 (the most likely token) or more; 1 is the model's own"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: must lie above 0 and be at most 1, which leaves all tokens")


def probabilities(logits_BV: Tensor, allowed_BV: Tensor, sampling: Sampling) -> Tensor:
    """Returns each token's probability of being drawn, float64 [B, V]: 0 for tokens outside `allowed_BV` or the nucleus.

    Every row of `allowed_BV` must allow a token. Of equally likely tokens, the one with the lower id comes first.
    """
    scores_BV = logits_BV.to(torch.float64).masked_fill(~allowed_BV, float("-inf"))
    order_BV = scores_BV.argsort(dim=-1, descending=True, stable=True)  # stable, so that the lower id comes first
    if sampling.temperature == 0.0:
        return torch.zeros_like(scores_BV).scatter_(1, order_BV[:, :1], 1.0)
    # The maximum is subtracted before the division, because a small temperature could make scores overflow.
    scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / sampling.temperature
    sorted_BV = scores_BV.softmax(-1).gather(1, order_BV)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV = torch.where(before_BV < sampling.top_p, sorted_BV, 0.0)
    sorted_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
    return torch.zeros_like(scores_BV).scatter_(1, order_BV, sorted_BV)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws one token per row, int64 [B]. It is the lowest id at which the cumulative probability exceeds the row's number
    in `uniform_B`, which is in [0, 1)."""
    cumulative_BV = probabilities_BV.cumsum(-1)
    # Rounding may leave the last cumulative probability below 1, so `uniform_B` is scaled by it.
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return (cumulative_BV <= target_B1).sum(-1).clamp_max(probabilities_BV.shape[-1] - 1)


def guided(logits_BV: Tensor, plain_BV: Tensor, guidance: float) -> Tensor:
    """Applies classifier-free guidance: returns plain + guidance x (conditional - plain), where all are log-probabilities.

    With `guidance` 1 the result is the model's own distribution. With a larger value, pictures follow the caption more
    closely. The formula is equation 6 of Ho and Salimans, arXiv 2207.12598, with w = guidance - 1.

    Args:
        plain_BV: Logits of the same sequences without captions. `logits_BV` has the logits with captions.
    """
    conditional, plain = logits_BV.to(torch.float64).log_softmax(-1), plain_BV.to(torch.float64).log_softmax(-1)
    return plain + guidance * (conditional - plain)


class UniformDraws:
    """A stream of uniform random numbers in [0, 1) for each sequence. A stream depends only on the seed and the sequence's
    index, and not on other sequences of the batch."""

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed((seed << 20) + number) for number in numbers]

    def __call__(self) -> Tensor:
        """Returns the next number of each stream, float64 [B]."""
        return torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in self._generators])
