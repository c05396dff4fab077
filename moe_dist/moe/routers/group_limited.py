"""Top-k of sigmoid scores within a few node groups of experts, as in DeepSeek-V3 (arXiv 2412.19437, section 2.1), GLM-4.5
and Kimi K2.

    s = sigmoid(x W^T),  b = the selection bias
    the n true experts are cut, in order, into n_group node groups; a token may use the topk_group node groups with the
    largest sums of their two largest s + b
    T(x) = top-k of s + b among the true experts of these node groups and all columns that are not true
    w_i  = scale s_i / (sum of s over T(x) without null columns + 1e-20),  or scale s_i without normalisation

Null, identity and constant columns also have s and b. But the limit on node groups does not apply to them, because they
cause no traffic. A null choice has no weight, and the sum in w_i does not contain it. Each modality's expert group is
divided into node groups separately.

The balance loss and the entropy use s / (sum of s over the modality group's columns) as probabilities, like DeepSeek-V3's
loss (equations 18 and 19). But their counts cover a whole step, while DeepSeek-V3's cover one sequence. The z-loss uses the
logits. Shape letters: T tokens, D hidden size, C columns, K choices, n true experts of a modality group, g node groups of a
modality group, m experts of a node group.
"""

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter, _Chosen

TINY = 1e-20  # prevents 0 / 0 where all scores underflow; transformers' DeepseekV3TopkRouter has the same value
BEST = 2  # a node group's score is the sum of its BEST (two) largest expert scores


class GroupLimitedRouter(TopKRouter):
    """Routes each of T tokens to experts of its modality's group, in the token's best node groups.

    Args:
        n_group: Number of node groups in each modality group. The number of the group's true experts is a multiple of it.
        topk_group: Number of node groups that a token may use.
        normalise: `true_chosen`: weights of chosen columns that are not null sum to `scale`. `none`: `scale` times the
            scores.
        selection_bias: If true, tokens choose by score + bias. Routing weights do not contain the bias.
    """

    def __init__(
        self,
        context: RouterContext,
        *,
        n_group: int = 1,
        topk_group: int = 1,
        normalise: Literal["true_chosen", "none"] = "true_chosen",
        scale: float = 1.0,
        selection_bias: bool = True,
    ) -> None:
        super().__init__(context, normalise=normalise, scale=scale, selection_bias=selection_bias)
        self.n_group, self.topk_group = n_group, topk_group

    def _probs(self, masked_TC: Tensor) -> Tensor:
        score_TC = masked_TC.sigmoid()  # 0 where the logit is -inf (outside the token's group)
        return score_TC / (score_TC.sum(dim=-1, keepdim=True) + TINY)

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        score_TC = masked_TC.detach().sigmoid()
        if self.selection_bias:
            score_TC = score_TC + self._bias(score_TC.dtype)
        score_TC = score_TC.masked_fill(masked_TC == float("-inf"), float("-inf"))
        if self.topk_group == self.n_group:  # a token may use all node groups
            return score_TC
        parts = [self._within_limit(score_TC[:, group.first_expert :][:, : group.num_experts]) for group in self.groups]
        return torch.cat([*parts, score_TC[:, self.num_experts :]], dim=1)

    def _within_limit(self, score_Tn: Tensor) -> Tensor:
        """Returns the scores of a modality group's true experts, which are -inf outside of the node groups that a token may
        use. Of node groups with equal scores, the token prefers the first."""
        score_Tgm = score_Tn.unflatten(1, (self.n_group, -1))
        best_Tg = score_Tgm.sort(dim=-1, descending=True).values[..., :BEST].sum(-1)
        order_Tg = best_Tg.sort(dim=-1, descending=True, stable=True).indices  # topk orders ties arbitrarily
        outside_Tg = torch.ones_like(best_Tg, dtype=torch.bool).scatter(1, order_Tg[:, : self.topk_group], False)
        return score_Tgm.masked_fill(outside_Tg[..., None], float("-inf")).flatten(1)

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen) -> Tensor:
        kept_TK = chosen.valid_TK & ~chosen.null_TK
        # An invalid choice may have a logit of -inf; the gradient of its sigmoid is 0, not NaN.
        score_TK = torch.where(kept_TK, masked_TC.gather(1, chosen.column_TK).sigmoid(), 0.0)
        if self.normalise == "none":
            return self.scale * score_TK
        # Adds one by one, as `top_k._softmax_among` does, so that zeros between true choices change no bit.
        return self.scale * score_TK / (reduce(torch.add, score_TK.split(1, dim=-1)) + TINY)
