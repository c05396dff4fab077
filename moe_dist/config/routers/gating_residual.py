from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import RouterSection


class GatingResidualRouterSection(RouterSection):
    """Top-k with the gating residual of MoE++: a learned map of the previous MoE layer's logits is added to the logits."""

    builds = "moe_dist.moe.routers.gating_residual:GatingResidualRouter"
    needs_previous = True
    needs = (
        ("model.mixture_of_depths", (None,), "a token that skips a layer has no logits there to add"),
        ("engine.passes_logits", (True,), "logits must pass to the next layer"),
    )

    kind: Literal["gating_residual"] = "gating_residual"
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = "true_chosen"
    """Columns over which the routing weights are a softmax, as with kind=top_k."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
    selection_bias: bool = Field(default=False, description="Choose by softmax + bias, as with kind=top_k.")

    def further_parameters(self, columns: int) -> int:
        return columns**2
