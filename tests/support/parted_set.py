"""One process choosing over the sets of many ranks: the oracle of mixture of depths over ranks."""

import math

import torch
from torch import Tensor

from moe_dist.model.depths_reference import choose


class PartedSet:
    """A selection scope of equal parts of the tokens, each a set of its own, chosen by the slow reference."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def choose(self, score_T: Tensor, capacity: float, *, name: str) -> tuple[Tensor, Tensor, int | None]:
        del name
        length = len(score_T)
        sets = [range(start, start + length // self.parts) for start in range(0, length, length // self.parts)]
        scores, real = score_T.tolist(), (score_T != float("-inf")).tolist()
        taken = choose(scores, real, capacity, sets)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[sorted(taken)] = True
        # The cut that the ranks report together: each set's least score, weighted by its tokens.
        weights = [sum(real[token] for token in members) for members in sets]
        cuts = [min((scores[t] for t in members if t in taken), default=0.0) for members in sets]
        mean = sum(w / (1 + math.exp(-c)) for w, c in zip(weights, cuts, strict=True)) / max(1, sum(weights))
        return mask, torch.tensor(mean, dtype=score_T.dtype).logit(), None
