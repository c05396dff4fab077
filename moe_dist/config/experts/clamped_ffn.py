from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.experts.base import ExpertsSection


class ClampedFFNExpertsSection(ExpertsSection):
    """Each true expert is a separate FFN with biases and a clamped SwiGLU (gpt-oss)."""

    builds = "moe_dist.moe.experts.activations:ClampedSwiGLU"
    served = "clamped_ffn"

    kind: Literal["clamped_ffn"] = "clamped_ffn"
    alpha: PositiveFloat = Field(default=1.702, description="Factor of the gate inside the sigmoid.")
    limit: PositiveFloat = Field(default=7.0, description="Largest value of the gate, and largest absolute value of up.")

    def num_biases(self, hidden_dim: int, ffn_dim: int) -> int:
        return 2 * ffn_dim + hidden_dim
