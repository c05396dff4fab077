from typing import Literal

from moe_dist.config.rope.base import RopeScalingSection


class LinearRopeSection(RopeScalingSection):
    """Divide every frequency by the factor (position interpolation, arXiv 2306.15595)."""

    builds = "moe_dist.model.rope:LinearScaling"
    served = "linear"

    kind: Literal["linear"] = "linear"
