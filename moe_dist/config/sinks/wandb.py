from typing import Literal

from pydantic import Field

from moe_dist.config.sinks.base import SinkSection


class WandbSinkSection(SinkSection):
    """Send records to Weights & Biases."""

    builds = "moe_dist.monitor.sinks.wandb:WandbSink"

    kind: Literal["wandb"] = "wandb"
    project: str = Field(description="Name of the Weights & Biases project.")
    mode: Literal["online", "offline"] = "online"
    """online sends records over the network. offline only writes them to the run folder."""
