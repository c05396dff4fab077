from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from moe_dist.config.rope.base import RopeScalingSection


class DynamicRopeSection(RopeScalingSection):
    """Raise the base of the frequencies with the length of a sequence that exceeds the original length (dynamic NTK)."""

    length_is_longest: ClassVar[bool] = True
    least_head_dim: ClassVar[int] = 4  # the exponent d / (d - 2) needs d > 2, and d is even

    kind: Literal["dynamic"] = "dynamic"
    original_max_position_embeddings: PositiveInt = Field(
        description="Number of tokens up to which the frequencies stay unchanged."
    )
