"""Defines the base class of the sections that scale rotary frequencies."""

from typing import ClassVar

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import KindSection


class RopeScalingSection(KindSection):
    """A change of the rotary frequencies for sequences that are longer than in pretraining. The keys have the same names as
    in `rope_parameters` of the library transformers."""

    length_is_longest: ClassVar[bool] = False  # true if transformers stores the original length as max_position_embeddings
    least_head_dim: ClassVar[int] = 2
    null_is_default: ClassVar[frozenset[str]] = frozenset()  # keys for which transformers replaces null by the default

    factor: PositiveFloat = Field(description="How many times longer sequences become.")
