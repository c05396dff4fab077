"""Predicted k: a linear head predicts a token's number of columns from its hidden state, as in Ada-K (arXiv 2410.10456).

    k(x) = top_k sigmoid(<u, x> + b),   T(x) = the ceil(k(x)) most probable columns of softmax(x W^T)
    m_j  = min(1, k(x) - (j - 1)) for the j-th of them: 1, and for the last one the rest of k(x)
    w_j  = scale m_j v_j,   v a softmax over T(x) without null columns, or the softmax over all columns

Ada-K samples an integer k and trains its predictor by policy gradient. This router instead multiplies the weight of the
last taken column by the fractional part of k(x), like the remainder in Adaptive Computation Time (Graves, arXiv
1603.08983). So u gets a gradient from the loss. If v is the softmax over all columns, the output is a continuous function
of k(x). If v is the softmax over T(x), every added column changes all weights. b is the budget shift (see `adaptive`).

Shape letters: T tokens, D hidden size, C columns, K choices, G expert groups.
"""

import torch
from torch import Tensor, nn

from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.routers.adaptive import AdaptiveRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import Normalise, _Chosen
from moe_dist.moe.routing.types import Routing, RoutingCache


class PredictedKRouter(AdaptiveRouter):
    """Routes T tokens to a predicted number of columns. Each group's gate also has the parameter `number` [1, D], the
    vector u in k(x). With `normalise="true_chosen"`, v is the softmax over the chosen columns that are not null. With
    `none`, v is the softmax over all columns."""

    def __init__(self, context: RouterContext, *, normalise: Normalise = "none", scale: float = 1.0) -> None:
        super().__init__(context, normalise=normalise, scale=scale)
        for group in self.groups:
            self.gate(group).register_parameter("number", nn.Parameter(torch.empty(1, context.hidden_dim)))

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        """See `TopKRouter.forward`."""
        cache = cache or RoutingCache()
        with torch.autocast(device_type=h_TD.device.type, enabled=False):  # autocast would run the router in bf16
            cache.number_T = self._number(h_TD.to(accumulation_dtype(h_TD.dtype)), group_T)
        return super().forward(h_TD, group_T, cache)

    def _number(self, h_TD: Tensor, group_T: Tensor) -> Tensor:
        """Returns k(x) [T], 0 for padding."""
        rows_GD = torch.cat([self._gate(group, "number") for group in self.groups]).to(h_TD.dtype)
        number_TG = (h_TD @ rows_GD.T + self._shift(h_TD.dtype)[:-1]).sigmoid() * self.top_k_G[:-1]
        member_TG = group_T[:, None] == torch.arange(len(self.groups), device=group_T.device)
        return torch.where(member_TG, number_TG, 0.0).sum(1)

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        return self._by_probability(probs_TC, masked_TC)

    def _factor(self, cache: RoutingCache) -> Tensor:
        """Returns the factors m [T, K], which are at most 1, and at most 0 for columns that are not taken."""
        assert cache.number_T is not None
        place_K = torch.arange(self.num_choices, device=cache.number_T.device)
        return (cache.number_T[:, None] - place_K).clamp_max(1.0)

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        return self._factor(cache) > 0

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> _Chosen:
        return super()._choose(masked_TC, probs_TC, group_T, cache)._replace(factor_TK=self._factor(cache))

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen) -> Tensor:
        assert chosen.factor_TK is not None
        return super()._weights(masked_TC, probs_TC, chosen) * chosen.factor_TK
