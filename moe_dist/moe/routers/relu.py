"""ReLU routing: a token takes the columns whose logit is positive (ReMoE, arXiv 2412.14711).

    r    = ReLU(x W^T + b)
    T(x) = the columns with r_i > 0, at most the top_k largest
    w_i  = scale r_i

A column with the logit 0 has the weight 0, so the output is a continuous function of x and of W while at most top_k logits
are positive. b is the selection bias of a controller. ReMoE itself controls the number of experts by the coefficient of an
L1 loss: it multiplies the coefficient by 1.2 after a step with too many experts, and divides it by 1.2 after a step with
too few. Here the balance loss `vanilla` equals ReMoE's loss, in which f_i is the load, up to the factor k, because the
balance loss uses the unnormalised r as probabilities. Its coefficient follows `loss.balance.schedule`. The reported entropy
is the entropy of r / sum(r).

A token may take no expert. If a token takes a null column, the column adds 0 to the output and uses one of the token's
top_k choices. Shape letters: T tokens, D hidden size, C columns, K choices.
"""

import torch
from torch import Tensor

from moe_dist.moe.routers.adaptive import AdaptiveRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routing.types import RoutingCache


class ReLURouter(AdaptiveRouter):
    """Routes T tokens by positive logits. `TopKRouter` describes `scale`."""

    def __init__(self, context: RouterContext, *, scale: float = 1.0) -> None:
        super().__init__(context, scale=scale)

    def _logits(self, h_TD: Tensor) -> Tensor:
        return super()._logits(h_TD) + self._bias(h_TD.dtype)

    def _probs(self, masked_TC: Tensor) -> Tensor:
        return masked_TC.relu()  # 0 where the logit is -inf (outside the token's group)

    def _shares(self, probs_TC: Tensor) -> Tensor:
        return probs_TC / probs_TC.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_TC.dtype).tiny)

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        return masked_TC.detach()

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        return masked_TC.gather(1, column_TK) > 0
