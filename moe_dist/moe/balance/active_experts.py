"""Holds the mean number of true (not null) experts per token at a target (LongCat-Flash, arXiv 2509.01322, section 2.1.2).

The paper calls this controller PID; it is an integral controller, because a bias is the sum of all its updates. A token has
k choices among n true experts and the other columns. Of T tokens in a step, c_i choose true expert i; c is the sum of c_i
over i. The update of bias b_i after a step:

    per expert, as published    b_i += mu (target / (k n) - c_i / (k T))
    per group                   b_i += mu (target - c / T) / (k n)       the mean over i of the update per expert

While the mean is below the target the biases rise, so true experts win choices from null experts. Both updates change the
mean bias equally. The update per expert also balances the true experts; the update per group adds one number to all their
biases, so it keeps the order of true experts.

mu = rate / (1 + step / decay_steps). The sum of mu over steps diverges and the sum of mu^2 converges. So the mean number of
true experts per token converges to the target although each step is noisy (Robbins and Monro, 1951), even as the router
learns.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from moe_dist.placement.placement import ExpertGroup


class ActiveExperts:
    """Rule of `BiasController` that holds the number of true experts per token at a target.

    Args:
        target: Target number of true experts per token, by name of the group. Groups that are not named are not controlled.
        rate: mu of the first step.
        decay_steps: Number of updates after which mu is half of `rate`; None keeps mu constant.
        ramp_steps: Number of updates in which the target moves in a straight line from the most true experts that a token
            can take to `target`.
    """

    def __init__(
        self,
        target: Mapping[str, float],
        *,
        rate: float,
        decay_steps: int | None = None,
        per: Literal["group", "expert"] = "group",
        ramp_steps: int = 0,
    ) -> None:
        self.ramp_steps = ramp_steps
        self.target, self.rate, self.decay_steps, self.per = dict(target), rate, decay_steps, per

    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """See `moe_dist.moe.balance.controller.Rule`."""
        target = self.target.get(group.name)
        if target is None:
            return None
        if step < self.ramp_steps:
            most = min(group.top_k, group.num_experts)
            target = most + (target - most) * step / self.ramp_steps
        mu = self.rate / (1.0 + (step / self.decay_steps if self.decay_steps is not None else 0.0))
        share_Ln = true_Ln / tokens_L1
        if self.per == "group":
            share_Ln = share_Ln.mean(dim=1, keepdim=True).expand_as(share_Ln)
        return mu / group.top_k * (target / group.num_experts - share_Ln)
