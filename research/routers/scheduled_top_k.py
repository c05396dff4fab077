"""Top-k with a fixed mean number of active experts in each layer. This router is the baseline for adaptive routers.

Each layer and group has a fixed mean number L of active experts per token. A token takes its floor(L) best experts and,
with the probability L - floor(L), also the next best expert. The random number that decides this does not depend on the
token's content. If L is an integer, the router is plain top-k.

    T(x) = the top floor(L) + [u < L - floor(L)] of x W^T,   u uniform in (0, 1) by (seed, step, layer, token)
    y    = sum over T of w_i E_i(x)

Evaluation draws random numbers, too, so that the mean number of experts is L as in training. Because evaluation has no
step, it numbers the tokens inside their batch. Shape letters: T tokens, D hidden size, C columns, K choices, G groups.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter, _Chosen
from moe_dist.moe.routing.draws import logistic
from moe_dist.moe.routing.types import RoutingCache

HELD_OUT = -1  # replaces the step number in the seed of evaluation's draws


class ScheduledTopKRouter(TopKRouter):
    """Routes T tokens, each inside its expert group, to L experts on average in this layer. No group may have null or
    zero-computation experts.

    Args:
        active_experts: For the name of each group, a list of the mean numbers L, one for each MoE layer. L is at most the
            group's top_k.
        options: See `TopKRouter`.
    """

    load_G: tuple[float, ...] = ()  # L
    whole_G: Tensor  # floor(L); the last entry, 0, is for padding, whose group is -1
    fraction_G: Tensor  # L - floor(L); the last entry, 0, is for padding

    def __init__(self, context: RouterContext, *, active_experts: Mapping[str, Sequence[float]], **options: Any) -> None:
        super().__init__(context, **options)
        self.place, self.seed = context.place, context.seed
        self.load_G = tuple(float(active_experts[group.name][self.place]) for group in self.groups)
        self.reset_buffers()  # repeated, because `load_G` was still empty in the base class

    def reset_buffers(self) -> None:
        super().reset_buffers()
        wholes = [math.floor(load) for load in self.load_G]
        fractions = [load - whole for load, whole in zip(self.load_G, wholes, strict=True)]
        self.register_buffer("whole_G", torch.tensor([*wholes, 0]), persistent=False)
        self.register_buffer("fraction_G", torch.tensor([*fractions, 0.0], dtype=torch.float64), persistent=False)

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> _Chosen:
        chosen = super()._choose(masked_TC, probs_TC, group_T, cache)
        kept_TK = chosen.valid_TK & self._kept(group_T, cache)
        return chosen._replace(valid_TK=kept_TK, true_TK=chosen.true_TK & kept_TK, null_TK=chosen.null_TK & kept_TK)

    def _kept(self, group_T: Tensor, cache: RoutingCache) -> Tensor:
        """Returns a bool [T, K] that marks the choices that each token keeps: its first floor(L) or floor(L) + 1 choices.
        Recomputation marks the same choices."""
        batch_info = cache.batch_info
        step, first = (HELD_OUT, 0) if batch_info is None else (batch_info.step, batch_info.first_token_of(batch_info.rank))
        place_T = torch.arange(group_T.shape[0], device=group_T.device) if cache.token_T is None else cache.token_T
        token_T = place_T + first
        column = torch.zeros(1, dtype=torch.int64, device=group_T.device)
        # float64, because fp32 rounds numbers near 1 to 1
        uniform_T = logistic((self.seed, step, self.place), token_T, column, torch.float64).sigmoid()[:, 0]
        whole_T, fraction_T = self._loads(group_T, cache)
        more_T = (uniform_T < fraction_T).to(torch.int64)
        place_K = torch.arange(self.num_choices, device=group_T.device)
        return place_K < (whole_T + more_T)[:, None]

    def _loads(self, group_T: Tensor, _cache: RoutingCache) -> tuple[Tensor, Tensor]:
        """Returns the whole part floor(L) and the fraction L - floor(L) of each token's mean number of experts L."""
        return self.whole_G[group_T], self.fraction_G[group_T]
