from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import AdaptiveRouterSection


class PredictedKRouterSection(AdaptiveRouterSection):
    """A linear head predicts the number of experts that a token takes, at most top_k."""

    builds = "moe_dist.moe.routers.adaptive:PredictedKRouter"
    served = "predicted_k"

    kind: Literal["predicted_k"] = "predicted_k"
    normalise: Literal["true_chosen", "none"] = "none"
    """How a token's routing weights are computed. The weight of its last column is then multiplied by the fraction of this
    column that the token takes. none: softmax over all columns of the group. true_chosen: softmax over the taken columns
    without null experts; then all weights jump when a token takes one column more."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        return {"number": (1, hidden_dim)}


class ReLURouterSection(AdaptiveRouterSection):
    """Each token takes the experts with positive logits, at most top_k. The weights are ReLU(logit) (ReMoE)."""

    builds = "moe_dist.moe.routers.adaptive:ReLURouter"
    served = "relu"

    kind: Literal["relu"] = "relu"
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")


class ThresholdRouterSection(AdaptiveRouterSection):
    """Each token takes the experts for which its score exceeds a learned threshold, at most top_k (DynMoE)."""

    builds = "moe_dist.moe.routers.adaptive:ThresholdRouter"
    served = "threshold"

    kind: Literal["threshold"] = "threshold"
    temperature: PositiveFloat = Field(default=0.1, description="Divisor of the cosines of token and router row.")
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        return {"level": (group.num_experts + group.num_null + group.num_zero_computation,)}
