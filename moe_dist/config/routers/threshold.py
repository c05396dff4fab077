from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import AdaptiveRouterSection


class ThresholdRouterSection(AdaptiveRouterSection):
    """Each token takes the experts for which its score exceeds a learned threshold, at most top_k (DynMoE)."""

    builds = "moe_dist.moe.routers.threshold:ThresholdRouter"
    served = "threshold"

    kind: Literal["threshold"] = "threshold"
    temperature: PositiveFloat = Field(default=0.1, description="Divisor of the cosines of token and router row.")
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        return {"level": (group.num_experts + group.num_null + group.num_zero_computation,)}
