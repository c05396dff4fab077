from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from moe_dist.config.rope.base import RopeScalingSection


class DynamicRopeSection(RopeScalingSection):
    """Raise the base of the frequencies with the sequence's length, once it is above the original one (dynamic NTK)."""

    length_is_longest: ClassVar[bool] = True
    least_head_dim: ClassVar[int] = 4  # d / (d - 2) is an exponent

    kind: Literal["dynamic"] = "dynamic"
    original_max_position_embeddings: PositiveInt = Field(
        description="Number of tokens up to which the frequencies stay unchanged."
    )
