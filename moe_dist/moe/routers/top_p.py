"""Top-p: a token takes its most probable columns until their probabilities add up to p (Huang et al., arXiv 2403.07652).

    q    = softmax(x W^T) over the group's columns, in falling order q_1 >= q_2 >= ...
    T(x) = the columns i with q_1 + ... + q_(i-1) < p + b,  at least one and at most top_k
    w_i  = scale q_i, or scale times a softmax over T(x) without null columns

b is the budget shift (see `adaptive`). A controller sets b in each layer and group, so that the mean number of true experts
reaches the controller's target. DTop-p (arXiv 2512.13996) has one p for all layers, a proportional-integral controller of
p, and a learned norm of the logits in each layer. In this router the controller `active_experts` changes p + b in each
layer separately. With the key `proportional`, it is also proportional-integral. Huang et al. add the entropy of q to the
loss. This router does not, because the controller determines the number of experts.

Shape letters: T tokens, C columns, K choices.
"""

import torch
from torch import Tensor

from moe_dist.moe.routers.adaptive import AdaptiveRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import Normalise
from moe_dist.moe.routing.types import RoutingCache


class TopPRouter(AdaptiveRouter):
    """Routes T tokens by cumulative probability. `p` is the initial bound on the cumulative probability, which a controller
    may change. With `normalise="none"` the weights are `scale` times probabilities, as published. With `true_chosen` the
    weights of the taken columns that are not null sum to `scale`."""

    def __init__(
        self, context: RouterContext, *, p: float = 0.4, normalise: Normalise = "none", scale: float = 1.0
    ) -> None:
        super().__init__(context, normalise=normalise, scale=scale)
        self.p = p

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        return self._by_probability(probs_TC, masked_TC)

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        prob_TK = probs_TC.gather(1, column_TK)
        before_TK = prob_TK.cumsum(1) - prob_TK  # exactly 0 in the first column
        bound_T = (self.p + self._shift(prob_TK.dtype)[group_T]).clamp_min(torch.finfo(prob_TK.dtype).tiny)
        return before_TK < bound_T[:, None]
