"""The oracle for mixture of depths on several ranks: one process selects tokens in the scopes of all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.routers.selection import OUTSIDE, SelectionScope
from moe_dist.moe.routing.types import ExpertsChoice
from tests.reference.mixture_of_depths import choose


class PartedSet(SelectionScope):
    """Divides the tokens into equal parts, each a selection scope in which the slow reference selects tokens."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        object.__setattr__(self, "parts", parts)

    def choose(self, logits_TE: Tensor, share_E: Tensor, lengths: Sequence[int], **_: Any) -> ExpertsChoice:
        parts: int = self.parts  # pyright: ignore[reportAttributeAccessIssue]
        (length,), scores = lengths, logits_TE[:, 0].tolist()
        sets = [range(start, start + length // parts) for start in range(0, length, length // parts)]
        real = [score != OUTSIDE for score in scores]
        taken = choose(scores, real, share_E.item(), sets)
        mask = torch.zeros(length, 1, dtype=torch.bool)
        mask[sorted(taken)] = True
        # Averages the scopes' lowest selected scores, weighted by the scopes' numbers of tokens.
        weights = [sum(real[token] for token in members) for members in sets]
        last = logits_TE.new_tensor([min((scores[t] for t in members if t in taken), default=0.0) for members in sets])
        mean = (last.sigmoid() * last.new_tensor(weights)).sum() / max(1, sum(weights))
        return ExpertsChoice(mask, None, mean[None])
