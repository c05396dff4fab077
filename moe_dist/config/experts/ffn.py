"""The section of plain experts."""

from typing import Literal

from pydantic import Field

from moe_dist.config.experts.base import ExpertsSection


class FFNExpertsSection(ExpertsSection):
    """Each true expert is an FFN of its own."""

    kind: Literal["ffn"] = Field(default="ffn", description="Each true expert is an FFN of its own.")
