from typing import Literal

from moe_dist.config.rope.base import RopeScalingSection


class LinearRopeSection(RopeScalingSection):
    """Divide every frequency by the factor (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
