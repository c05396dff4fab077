from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import AdaptiveRouterSection


class ReLURouterSection(AdaptiveRouterSection):
    """Each token takes the experts with positive logits, at most top_k. The weights are ReLU(logit) (ReMoE)."""

    builds = "moe_dist.moe.routers.relu:ReLURouter"
    served = "relu"

    kind: Literal["relu"] = "relu"
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
