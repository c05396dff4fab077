from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.experts.clamped_ffn import ClampedFFNExpertsSection
from moe_dist.config.experts.ffn_lora import AdaptedFFNExpertsSection


class AdaptedClampedFFNExpertsSection(AdaptedFFNExpertsSection):
    """Each true expert is a frozen expert of the base (run.init_from) with biases and clamped SwiGLU, and has LoRA adapters
    on its matrices. Routers are frozen, too."""

    builds = "moe_dist.moe.experts.expert_lora:ExpertLoRA"
    served = "clamped_ffn_lora"

    kind: Literal["clamped_ffn_lora"] = "clamped_ffn_lora"  # pyright: ignore[reportIncompatibleVariableOverride]
    swiglu_alpha: PositiveFloat = Field(default=1.702, description="The base's factor of the gate inside the sigmoid.")
    swiglu_limit: PositiveFloat = Field(default=7.0, description="The base's largest gate, and largest absolute up.")

    @property
    def base(self) -> ClampedFFNExpertsSection:
        return ClampedFFNExpertsSection(alpha=self.swiglu_alpha, limit=self.swiglu_limit)

    def num_biases(self, hidden_dim: int, ffn_dim: int) -> int:
        return self.base.num_biases(hidden_dim, ffn_dim)
