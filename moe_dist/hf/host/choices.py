"""Rules by which the tokens of a hosted model take fewer experts than the family's router chooses.

A choice that a token does not take becomes an absent pair, which sends no row and costs no arithmetic. The family's code is
unchanged. Shape letters: T tokens, C columns, E true experts, K choices of a token, D hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.hf.host.banks import GUIDE
from moe_dist.hf.host.model import Choice, FamilyRouter
from moe_dist.moe.routers.adaptive import TopPRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import RoutingCache


def family_router(context: RouterContext, **options: Any) -> FamilyRouter:
    """Makes a layer's router. Tokens take all choices of the family's router or, with null experts, the best of all
    columns."""
    return NullColumns(context, **options) if any(group.num_null for group in context.groups) else FamilyRouter(context)


class FamilyTopP(TopPRouter, FamilyRouter):
    """Among the choices of the family's router, a token takes the ones of largest weight until their weights reach the
    fraction p + b of the token's total weight, but at least one. A controller sets b. With `normalise="true_chosen"` the
    taken choices are scaled up to the total weight; otherwise they keep the family's weights."""

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        weight_TK = self._family_weights()
        share_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        order_TK = share_TK.argsort(dim=-1, descending=True, stable=True)  # a family's choices may be unsorted
        kept_TK = super()._kept(masked_TC, share_TK, order_TK, group_T, cache)
        return torch.empty_like(kept_TK).scatter_(1, order_TK, kept_TK)

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: Any) -> Tensor:
        weight_TK = super()._weights(masked_TC, probs_TC, chosen)
        if self.normalise == "true_chosen":
            whole_T1 = self._family_weights().sum(-1, keepdim=True)
            taken_T1 = weight_TK.sum(-1, keepdim=True)
            weight_TK = weight_TK * (whole_T1 / torch.where(taken_T1 > 0, taken_T1, 1.0))  # padding takes no choice
        return self.scale * weight_TK

    def _family_weights(self) -> Tensor:
        """Returns the family's weights [T, K]; 0 for choices that name no expert."""
        assert self.choice is not None, "the family's router runs before its experts"
        ids_TK = self.choice.ids_TK
        return torch.where((ids_TK >= 0) & (ids_TK < self.num_experts), self.choice.weights_TK, 0.0)


class NullColumns(FamilyRouter):
    """AdaMoE: each token chooses its top k among the family's experts and null experts. The family's router returns the
    logits of both (`add_null_rows`). `TopKRouter` chooses and makes the weights."""

    def learn(self, family: str, choice: Choice) -> None:
        """Raises ConfigError if the family computes the weights of its choices by another rule than `normalise`."""
        super().learn(family, choice)
        logits_TE, ids_TK = choice.scores_TE[:, : self.num_experts].double(), choice.ids_TK.long()
        rules_TK = {
            "true_chosen": logits_TE.gather(1, ids_TK).softmax(-1),
            "true_all": logits_TE.softmax(-1).gather(1, ids_TK),
        }
        weights_TK = choice.weights_TK.double()
        fits = [name for name, each_TK in rules_TK.items() if torch.allclose(weights_TK, each_TK, rtol=1e-2)]
        if self.normalise not in fits:
            fix = f"set model.moe.router.normalise={fits[0]}" if fits else "remove num_null"
            raise ConfigError(
                f"model.moe.router.normalise={self.normalise}: the routers of {family} weigh their choices by another "
                f"rule, and null experts must not change it; {fix}",
                see=GUIDE,
            )

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> Any:
        return TopKRouter._choose(self, masked_TC, probs_TC, group_T, cache)

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: Any) -> Tensor:
        return TopKRouter._weights(self, masked_TC, probs_TC, chosen)


def add_null_rows(router: Any, num_null: int) -> None:
    """Appends `num_null` rows of null experts to the weight [E, D] of a family's router. The router then also returns the
    logits of null experts."""
    true_ED = router.weight
    router.weight = nn.Parameter(true_ED.new_empty(len(true_ED) + num_null, true_ED.shape[1]))
    router.forward = partial(_with_null_rows, router, router.forward, len(true_ED))


def _with_null_rows(router: Any, forward: Callable[..., Any], num_experts: int, h_TD: Tensor) -> Any:
    """Runs a family's router on its true rows, and appends the logits of the null rows. Null rows are multiplied in slices
    of n rows, so that a null row that copies a true row gets a bit-equal logit (`TopKRouter`)."""
    whole_CD = router._parameters["weight"]
    true_ED, *nulls = whole_CD.split(num_experts)
    router._parameters["weight"] = true_ED
    try:
        logits_TE, *more = forward(h_TD)
    finally:
        router._parameters["weight"] = whole_CD
    h_TD = h_TD.reshape(-1, whole_CD.shape[1])
    return torch.cat([logits_TE, *(F.linear(h_TD, rows) for rows in nulls)], dim=1), *more
