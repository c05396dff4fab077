"""Top-k routing with the gating residual of MoE++ (arXiv 2410.07348, section 3.2): each layer maps the previous MoE layer's
logits by a learned matrix, and adds the result to its own logits. As in the code of MoE++, gradients pass through the
logits of all layers.

    z_1 = x W_1^T,   z_l = x W_l^T + z_{l-1} V_l^T        over all columns of the token's group

A token has the same group in all layers, so logits of different groups are never added. Shape letters: T tokens, D hidden
size, C columns, c columns of a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import Normalise, TopKRouter
from moe_dist.moe.routing.types import Routing, RoutingCache, group_columns


class GatingResidualRouter(TopKRouter):
    """Routes T tokens by the logits of this MoE layer and of the previous one. Except in the first MoE layer, each group's
    gate also has the parameter `residual` [c, c], which is V in the formula above. `forward` also returns the logits. The
    transformer passes them to the next MoE layer. `TopKRouter` explains all arguments."""

    by_group_C: Tensor  # all columns, sorted by group
    place_C: Tensor  # index of each column in `by_group_C`

    def __init__(
        self,
        context: RouterContext,
        *,
        normalise: Normalise = "true_chosen",
        scale: float = 1.0,
        selection_bias: bool = False,
    ) -> None:
        self.is_first = context.place == 0
        super().__init__(context, normalise=normalise, scale=scale, selection_bias=selection_bias)
        for group in () if self.is_first else self.groups:
            matrix = nn.Parameter(torch.empty(group.num_columns, group.num_columns))
            self.gate(group).register_parameter("residual", matrix)

    def reset_buffers(self) -> None:
        super().reset_buffers()
        group_C = group_columns(self.groups)
        by_group_C = sorted(range(len(group_C)), key=lambda column: (group_C[column], column))
        self.register_buffer("by_group_C", torch.tensor(by_group_C), persistent=False)
        self.register_buffer("place_C", torch.tensor(by_group_C).argsort(), persistent=False)

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        """See `TopKRouter.forward`. Except in the first MoE layer, the cache must have the previous layer's logits."""
        cache = cache or RoutingCache()
        routing = super().forward(h_TD, group_T, cache)
        # Block recompute keeps the cache, so logits in the cache would keep their autograd graph in memory.
        logits_TC, cache.logits_TC = cache.logits_TC, None
        return routing._replace(logits_TC=logits_TC)

    def _all_logits(self, h_TD: Tensor, cache: RoutingCache) -> Tensor:
        logits_TC = super()._all_logits(h_TD, cache)
        if not self.is_first:
            assert cache.previous_TC is not None, "the transformer passes the logits of the MoE layer before"
            logits_TC = logits_TC + self._mapped(cache.previous_TC.to(h_TD.dtype))
        cache.logits_TC = logits_TC
        return logits_TC

    def _mapped(self, previous_TC: Tensor) -> Tensor:
        """Returns V z for the columns of each group, [T, C]."""
        parts = previous_TC[:, self.by_group_C].split([group.num_columns for group in self.groups], dim=1)
        pairs = zip(parts, self.groups, strict=True)
        mapped = [F.linear(part_Tc, self._gate(group, "residual").to(part_Tc.dtype)) for part_Tc, group in pairs]
        return torch.cat(mapped, dim=1)[:, self.place_C]
