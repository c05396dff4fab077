from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import RouterSection


class TopKRouterSection(RouterSection):
    """Top-k over true, null and zero-computation experts (AdaMoE); plain top-k where a group has true ones alone."""

    softmax_top_k: ClassVar[bool] = True

    kind: Literal["top_k"] = "top_k"
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = "true_chosen"
    """Routing weights are a softmax over the chosen experts that are not null (AdaMoE), over all chosen experts, over all
    experts that are not null, chosen or not, or the plain softmax over the whole group."""
    scale: PositiveFloat = Field(default=1.0, description="Factor on every routing weight.")
    null_logit: Literal["each", "single"] = "each"
    """Null experts have a router row each, or a single one whose logit stands in all of them."""
    selection_bias: bool = False
    """Choose by softmax + bias; the bias starts at 0 and enters no weight (LongCat-Flash, Ernie 4.5)."""
