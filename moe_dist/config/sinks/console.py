from typing import Literal

from pydantic import Field, PositiveInt

from moe_dist.config.sinks.base import SinkSection


class ConsoleSinkSection(SinkSection):
    """Progress bar on a terminal, plain lines elsewhere."""

    kind: Literal["console"] = "console"
    every: PositiveInt = Field(default=10, description="Steps between plain lines where there is no terminal.")
