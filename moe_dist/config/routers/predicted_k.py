from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import AdaptiveRouterSection


class PredictedKRouterSection(AdaptiveRouterSection):
    """A linear head predicts the number of experts that a token takes, at most top_k."""

    builds = "moe_dist.moe.routers.predicted_k:PredictedKRouter"
    served = "predicted_k"

    kind: Literal["predicted_k"] = "predicted_k"
    normalise: Literal["true_chosen", "none"] = "none"
    """Routing weights, before the weight of the last taken column is multiplied by a fraction. none: softmax over all
    columns of the group. true_chosen: softmax over the taken columns without null experts; then all weights jump when a
    token takes one column more."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")

    def further_tensors(self, group: Any, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        return {"number": (1, hidden_dim)}
