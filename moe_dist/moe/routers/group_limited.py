"""Top-k of sigmoid scores among a few node groups (DeepSeek-V3, arXiv 2412.19437, section 2.1; GLM-4.5, Kimi K2).

    s = sigmoid(x W^T),  b = the selection bias
    the n true experts are cut, in order, into n_group node groups; a token's are the topk_group with the largest sums of
    their two best s + b
    T(x) = top-k of s + b among the true experts of those node groups and all columns that are not true
    w_i  = scale s_i / (sum of s over T(x) without null columns + 1e-20),  or scale s_i unnormalised

Null, identity and constant columns cost no traffic, so that no node group limits them: they compete with the true experts
under every limit, by sigmoids and biases of their own. As everywhere, a null choice has no weight and takes no part in the
sum. Each modality group has node groups of its own.

The balance loss takes s / sum of s over the group's columns for probabilities, as DeepSeek-V3's loss does (its equations 18
and 19), with counts over the whole step instead of one sequence; the entropy is that of these too. The z-loss is of the
logits, as everywhere. Shape letters: T tokens, D hidden size, C columns, K choices, n true experts of a group, g its node
groups.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.top_k import TopKRouter, _Chosen
from moe_dist.placement.placement import ExpertGroup

TINY = 1e-20  # of transformers' DeepseekV3TopkRouter: no division by 0 where all scores underflow
BEST = 2  # experts of a node group that its score sums


class GroupLimitedRouter(TopKRouter):
    """Routes T tokens, each inside its modality's group and there inside its best node groups.

    Args:
        hidden_dim, groups, scale, capacity: As `TopKRouter`.
        n_group: Node groups of each group's true experts; divides their number.
        topk_group: Node groups that a token may use.
        normalise: Weights sum to `scale` over the chosen experts that are not null (`true_chosen`), or are the plain
            scores.
        selection_bias: Choose by score + bias; no weight sees the bias.
    """

    def __init__(
        self,
        hidden_dim: int,
        groups: Sequence[ExpertGroup],
        *,
        n_group: int = 1,
        topk_group: int = 1,
        normalise: Literal["true_chosen", "none"] = "true_chosen",
        scale: float = 1.0,
        selection_bias: bool = True,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__(
            hidden_dim, groups, normalise=normalise, scale=scale, selection_bias=selection_bias, capacity=capacity
        )
        self.n_group, self.topk_group = n_group, topk_group

    def _probs(self, masked_TC: Tensor) -> Tensor:
        score_TC = masked_TC.sigmoid()  # 0 at -inf, outside the token's group
        return score_TC / (score_TC.sum(dim=-1, keepdim=True) + TINY)

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        score_TC = masked_TC.detach().sigmoid()
        if self.selection_bias:
            score_TC = score_TC + self._bias(score_TC.dtype)
        score_TC = score_TC.masked_fill(masked_TC == float("-inf"), float("-inf"))
        if self.topk_group == self.n_group:
            return score_TC
        parts = [self._within_limit(score_TC[:, group.first_expert :][:, : group.num_experts]) for group in self.groups]
        return torch.cat([*parts, score_TC[:, self.num_experts :]], dim=1)

    def _within_limit(self, score_Tn: Tensor) -> Tensor:
        """Scores of a group's true experts, -inf outside each token's node groups; ties go to the earlier one."""
        score_Tgm = score_Tn.unflatten(1, (self.n_group, -1))
        best_Tg = score_Tgm.sort(dim=-1, descending=True).values[..., :BEST].sum(-1)
        order_Tg = best_Tg.sort(dim=-1, descending=True, stable=True).indices
        outside_Tg = torch.ones_like(best_Tg, dtype=torch.bool).scatter(1, order_Tg[:, : self.topk_group], False)
        return score_Tgm.masked_fill(outside_Tg[..., None], float("-inf")).flatten(1)

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen) -> Tensor:
        """Weight of each choice [T, K]; 0 for null choices and for places that the token does not have."""
        kept_TK = chosen.valid_TK & ~chosen.null_TK
        # A place that the token does not have may hold a column at -inf, whose sigmoid has a gradient of 0, never NaN.
        score_TK = torch.where(kept_TK, masked_TC.gather(1, chosen.column_TK).sigmoid(), 0.0)
        if self.normalise == "none":
            return self.scale * score_TK
        # One after the other, as in `top_k`: zeros between the true choices must change no bit.
        return self.scale * score_TK / (reduce(torch.add, score_TK.split(1, dim=-1)) + TINY)
