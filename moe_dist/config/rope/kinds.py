from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import PositiveInt, Violation
from moe_dist.config.rope.base import RopeScalingSection


class DynamicRopeSection(RopeScalingSection):
    """Raise the base of the frequencies for sequences above the original length, growing with length (dynamic NTK)."""

    builds = "moe_dist.model.rope:DynamicScaling"
    served = "dynamic"
    length_is_longest = True
    least_head_dim = 4  # the exponent d / (d - 2) needs d > 2, and d is even

    kind: Literal["dynamic"] = "dynamic"
    original_max_position_embeddings: PositiveInt = Field(
        description="Number of tokens up to which the frequencies stay unchanged."
    )


class LinearRopeSection(RopeScalingSection):
    """Divide every frequency by the factor (position interpolation, arXiv 2306.15595)."""

    builds = "moe_dist.model.rope:LinearScaling"
    served = "linear"

    kind: Literal["linear"] = "linear"


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


class YarnRopeSection(RopeScalingSection):
    """Divide low frequencies by the factor, keep high frequencies, and scale cosines and sines (YaRN, arXiv 2309.00071)."""

    builds = "moe_dist.model.rope:YarnScaling"
    served = "yarn"
    null_is_default = frozenset(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"))

    kind: Literal["yarn"] = "yarn"
    original_max_position_embeddings: PositiveInt = Field(description="Longest sequence of pretraining, in tokens.")
    beta_fast: PositiveFloat = 32.0
    """A frequency stays unchanged if it makes more than this number of rotations over the original length."""
    beta_slow: PositiveFloat = 1.0
    """A frequency is divided by the factor if it makes fewer than this number of rotations over the original length."""
    attention_factor: PositiveFloat | None = None
    """Factor of cosines and sines. null: 0.1 ln(factor) + 1, or the quotient that mscale and mscale_all_dim define."""
    mscale: PositiveFloat | None = Field(default=None, description="Factor of ln(factor) in the quotient's numerator.")
    mscale_all_dim: PositiveFloat | None = Field(default=None, description="The same in the quotient's denominator.")
    truncate: bool = Field(default=True, description="Round the two bounds between the frequencies to whole numbers.")
