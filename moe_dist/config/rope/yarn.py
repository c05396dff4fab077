from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.rope.base import RopeScalingSection


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
