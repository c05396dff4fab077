"""Balances a group's true (not null) experts without a loss (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

    b_i += rate * sign(mean of c - c_i)     c_i choices of true expert i in a step

In a group with null or zero-computation columns, the mean of all signs is subtracted from each sign. The mean bias then
does not change. The mean bias determines the number of true experts that a token takes, and only `active_experts` may
change this number. In all other groups the mean bias affects no choice, so the published rule is used.
"""

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup


class LossFree:
    """A rule of `BiasController` that balances true experts. `rate` is the factor of the signs."""

    def __init__(self, *, rate: float) -> None:
        self.rate = rate

    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """See `moe_dist.moe.balance.controller.Rule`."""
        # compares the integers n c_i and the sum of c, because rounding a mean could flip a sign
        sign_Ln = torch.sign(true_Ln.sum(dim=1, keepdim=True) - group.num_experts * true_Ln)
        if group.num_columns > group.num_experts:
            sign_Ln = sign_Ln - sign_Ln.mean(dim=1, keepdim=True)  # keeps the mean bias
        return self.rate * sign_Ln
