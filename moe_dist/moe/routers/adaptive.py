"""The base class of routers that choose a different number of experts for each token, at most `top_k`.

    T(x) = those of the token's top_k columns of largest score that the router's rule keeps
    y    = sum over T(x) without null columns of w_i E_i(x); 0 if T(x) has only null columns

A choice that the rule does not keep becomes an absent pair, like a null choice. Each router's rule reads only one token, so
evaluation is causal. A recomputed forward reuses the choices of the first forward.

Bias controllers (`moe_dist.moe.balance`) change a selection bias of each column, so that the mean number of true experts
per token stays at a target. The mean bias of a group's true columns is called the budget shift, because it changes the
number of columns that a token takes. In `top_p` and `predicted_k` only the deviations from the budget shift change the
order of the columns; in `relu` and `threshold` the whole bias of a column moves the column's threshold.

Shape letters: T tokens, C columns, K choices, G expert groups, E true experts.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import Normalise, TopKRouter, _Chosen
from moe_dist.moe.routing.types import RoutingCache


class AdaptiveRouter(TopKRouter):
    """Routes tokens, each inside its expert group, to the columns that `_kept` marks. Arguments are as in `TopKRouter`."""

    def __init__(self, context: RouterContext, *, normalise: Normalise = "none", scale: float = 1.0) -> None:
        super().__init__(context, normalise=normalise, scale=scale, selection_bias=True)

    @abstractmethod
    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        """Returns a bool [T, K] without gradient: whether a token takes each of its K best columns, the best first."""

    def _one_kernel(self, logits_TC: Tensor, cache: RoutingCache) -> bool:
        return False

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> _Chosen:
        chosen = super()._choose(masked_TC, probs_TC, group_T, cache)
        if cache.kept_TK is None:
            with torch.no_grad():
                cache.kept_TK = self._kept(masked_TC, probs_TC, chosen.column_TK, group_T, cache)
        kept_TK = chosen.valid_TK & cache.kept_TK
        return chosen._replace(valid_TK=kept_TK, true_TK=chosen.true_TK & kept_TK, null_TK=chosen.null_TK & kept_TK)

    def _shift(self, dtype: torch.dtype) -> Tensor:
        """Returns the budget shift of each group [G + 1]; the last entry, 0, is for padding (group -1)."""
        means = [self._gate(group, "bias")[: group.num_experts].mean() for group in self.groups]
        return torch.stack([*means, torch.zeros_like(means[0])]).to(dtype)

    def _by_probability(self, probs_TC: Tensor, masked_TC: Tensor) -> Tensor:
        """Returns the scores [T, C] that order columns: probability + (bias - budget shift), or -inf outside the group."""
        bias_C = self._bias(probs_TC.dtype)
        true_E = bias_C[: self.num_experts] - self._shift(probs_TC.dtype)[self.group_of_expert_E]
        score_TC = probs_TC.detach() + torch.cat([true_E, bias_C[self.num_experts :]])
        return score_TC.masked_fill(masked_TC == float("-inf"), float("-inf"))
