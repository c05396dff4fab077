"""The slow reference of `research.routers.scheduled_top_k`: a loop over tokens with given uniform numbers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fixed_load_weights(logits_TE: Tensor, load: float, uniform: Sequence[float]) -> Tensor:
    """Returns weights [T, E] of one group: each token's softmax over its best floor(load) experts. A token whose
    uniform number is below load - floor(load) takes one more expert. The other weights are 0. Among equal logits the lower
    index comes first. The weights are differentiable."""
    rows = []
    for logits_E, u in zip(logits_TE, uniform, strict=True):
        count = math.floor(load) + (u < load - math.floor(load))
        best = sorted(range(len(logits_E)), key=lambda expert, row=logits_E: (-float(row[expert]), expert))[:count]
        row = torch.zeros_like(logits_E)
        if best:
            exponentials = [logits_E[expert].exp() for expert in best]
            total = torch.stack(exponentials).sum()
            row = torch.stack(
                [exponentials[best.index(e)] / total if e in best else logits_E[e] * 0 for e in range(len(logits_E))]
            )
        rows.append(row)
    return torch.stack(rows)
