from typing import Literal

from moe_dist.config.experts.base import ExpertsSection


class FFNExpertsSection(ExpertsSection):
    """Each true expert is an FFN of its own."""

    kind: Literal["ffn"] = "ffn"
