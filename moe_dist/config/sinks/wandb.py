from typing import Literal

from pydantic import Field

from moe_dist.config.sinks.base import SinkSection


class WandbSinkSection(SinkSection):
    """Weights & Biases."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field(description="Project in wandb.")
    mode: Literal["online", "offline"] = Field(default="online", description="offline writes to the run folder only.")
