from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.sinks.base import SinkSection


class ConsoleSinkSection(SinkSection):
    """Show a progress bar on a terminal. Without a terminal, print lines of text instead."""

    builds = "moe_dist.monitor.sinks.console:ConsoleSink"

    kind: Literal["console"] = "console"
    every: PositiveInt = Field(default=10, description="Steps between two plain lines.")
