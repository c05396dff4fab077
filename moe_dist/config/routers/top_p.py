from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Share
from moe_dist.config.routers.base import AdaptiveRouterSection


class TopPRouterSection(AdaptiveRouterSection):
    """Each token takes its most probable experts until their probabilities add up to p, but at most top_k (DTop-p)."""

    builds = "moe_dist.moe.routers.top_p:TopPRouter"
    served = "top_p"
    hosted = "moe_dist.hf.host.choices:FamilyTopP"
    least_columns = 1

    kind: Literal["top_p"] = "top_p"
    p: Share = 0.4
    """Sum of probabilities at which a token takes no further columns. model.moe.balance changes it per layer and group."""
    normalise: Literal["true_chosen", "none"] = "none"
    """Routing weights. none: the probabilities. true_chosen: the probabilities of the taken columns without null experts,
    divided by their sum."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
