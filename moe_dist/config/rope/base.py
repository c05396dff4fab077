"""The base class of the sections of rotary scalings."""

from typing import ClassVar

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import KindSection


class RopeScalingSection(KindSection):
    """A change of the rotary frequencies for sequences that are longer than in pretraining. The keys have the names of
    transformers' `rope_parameters`."""

    length_is_longest: ClassVar[bool] = False  # true if transformers has the original length in max_position_embeddings
    least_head_dim: ClassVar[int] = 2
    null_is_default: ClassVar[frozenset[str]] = frozenset()  # keys for which transformers takes null as the default

    factor: PositiveFloat = Field(description="How many times longer sequences become.")
