from typing import Literal

from moe_dist.config.experts.base import ExpertsSection


class FFNExpertsSection(ExpertsSection):
    """Each true expert is a separate SwiGLU FFN."""

    kind: Literal["ffn"] = "ffn"
