from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PositiveInt
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
