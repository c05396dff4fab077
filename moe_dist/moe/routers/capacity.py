"""Capacity in token choice: the largest number of (token, expert) pairs that an expert computes. Pairs beyond the capacity
are dropped.

A dropped pair becomes an absent pair, which is not sent. So no tensor's shape depends on the choice of dropped pairs. Shape
letters: N (token, expert) pairs in token order, E true experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_dist.moe.kernels.torch_kernels import counting_order

Drop = Literal["probability", "position"]


@dataclass(frozen=True)
class Capacity:
    """The capacity of the experts of all groups.

    Attributes:
        factor: An expert takes at most ceil(factor * k T / columns) pairs. T is the number of its group's tokens in the
            selection scope, and `columns` is the number of the group's experts of all kinds. With factor 1 the capacity is
            each expert's load if choices are spread evenly.
        drop: `probability` drops an expert's least probable pairs. Of two equally probable pairs, it drops the pair of the
            later token. `position` drops the pairs of the last tokens.
        scope: The tokens whose pairs count towards one capacity. `rank`: the tokens of one rank's micro-batch.
    """

    factor: float
    drop: Drop = "probability"
    scope: Literal["rank"] = "rank"


def capacity_of(factor: float, choices: Tensor, columns: Tensor) -> Tensor:
    """Returns ceil(factor * choices / columns) as int64. A value at most 1e-9 above an integer is rounded down."""
    return torch.ceil(factor * choices.to(torch.float64) / columns.to(torch.float64) - 1e-9).to(torch.int64)


def over_capacity(expert_N: Tensor, score_N: Tensor, capacity_E: Tensor, drop: Drop) -> Tensor:
    """Returns a bool [N] that is true for pairs that exceed their expert's capacity. Costs no host sync.

    Args:
        expert_N: int64, logical expert of each pair; negative for an absent pair. Absent pairs are never dropped.
        score_N: Probability of each pair, without gradient.
        capacity_E: int64, largest number of pairs of each expert.
    """
    num_experts = capacity_E.shape[0]
    bin_N = torch.where(expert_N < 0, num_experts, expert_N)  # the last bin takes absent pairs

    # Sorts pairs by preference, then stably by expert. For `position` the token order of the pairs is the preference.
    order_N = torch.arange(bin_N.shape[0], device=bin_N.device)
    if drop == "probability":
        order_N = torch.sort(score_N, descending=True, stable=True).indices
    order_N = order_N[counting_order(bin_N[order_N], num_experts + 1)]
    sorted_N = bin_N[order_N]
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=bin_N.device)
    counts.scatter_add_(0, bin_N, torch.ones_like(bin_N))
    first = counts.cumsum(0) - counts
    place_N = torch.arange(bin_N.shape[0], device=bin_N.device) - first[sorted_N]
    over_N = (place_N >= capacity_E[sorted_N.clamp_max(num_experts - 1)]) & (sorted_N < num_experts)
    return torch.zeros_like(over_N).scatter_(0, order_N, over_N)  # from sorted order back to the order of pairs
