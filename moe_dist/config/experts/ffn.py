from typing import Literal

from moe_dist.config.experts.base import ExpertsSection


class FFNExpertsSection(ExpertsSection):
    """Each true expert is a separate SwiGLU FFN."""

    builds = "moe_dist.moe.experts.activations:SwiGLU"
    served = "ffn"
    static = True
    replicas = True

    kind: Literal["ffn"] = "ffn"
