"""Holds the mean number of true experts per token at a target (LongCat-Flash, arXiv 2509.01322, section 2.1.2).

The paper calls it PID; it is an integral controller: the bias is the sum of all errors. With k choices among n true experts
and others, the load c_i / T of true expert i, and its sum c / T over the n:

    per expert, as published    b_i += mu (target / (k n) - c_i / (k T))
    per group                   b_i += mu (target - c / T) / (k n)       the mean of the above, the same for all i

Below the target the biases rise, so true experts win choices from null ones. Both forms move the mean bias equally; the
first also balances the true experts, the second leaves their order to the router.

mu = rate / (1 + step / decay_steps). The sum of mu over steps diverges and the sum of its squares converges, so the mean
converges to the target although each step is noisy (Robbins and Monro, 1951), and still follows a router that learns.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from moe_dist.placement.placement import ExpertGroup


class ActiveExperts:
    """The rule.

    Args:
        target: True experts per token, by name of the group; other groups are not controlled.
        rate: mu of the first step.
        decay_steps: Updates after which mu is half the rate; None keeps it constant.
        per: Whether the true experts of a group share one update, or each gets one by its own load.
    """

    def __init__(
        self,
        target: Mapping[str, float],
        *,
        rate: float,
        decay_steps: int | None = None,
        per: Literal["group", "expert"] = "group",
    ) -> None:
        self.target, self.rate, self.decay_steps, self.per = dict(target), rate, decay_steps, per

    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """As `moe_dist.moe.balance.controller.Rule`."""
        target = self.target.get(group.name)
        if target is None:
            return None
        mu = self.rate / (1.0 + (step / self.decay_steps if self.decay_steps is not None else 0.0))
        share_Ln = true_Ln / tokens_L1
        if self.per == "group":
            share_Ln = share_Ln.mean(dim=1, keepdim=True).expand_as(share_Ln)
        return mu / group.top_k * (target / group.num_experts - share_Ln)
