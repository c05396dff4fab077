from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import PositiveInt, Violation
from moe_dist.config.rope.base import RopeScalingSection


class Llama3RopeSection(RopeScalingSection):
    """Divide low frequencies by the factor, and leave high frequencies unchanged (Llama 3.1, arXiv 2407.21783)."""

    builds = "moe_dist.model.rope:Llama3Scaling"
    served = "llama3"

    kind: Literal["llama3"] = "llama3"
    original_max_position_embeddings: PositiveInt = Field(description="Longest sequence of pretraining, in tokens.")
    low_freq_factor: PositiveFloat = Field(description="Low: the wavelength is above the original length / this factor.")
    high_freq_factor: PositiveFloat = Field(description="High: the wavelength is below the original length / this factor.")

    def violations(self) -> Iterator[Violation]:
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            problem = f"high_freq_factor={high} must be above low_freq_factor={low}; raise it, or lower the other"
            yield Violation(("high_freq_factor", "low_freq_factor"), problem)
