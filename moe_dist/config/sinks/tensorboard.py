from typing import Literal

from pydantic import Field, PositiveInt

from moe_dist.config.sinks.base import SinkSection


class TensorBoardSinkSection(SinkSection):
    """TensorBoard event files in the run folder."""

    kind: Literal["tensorboard"] = "tensorboard"
    pictures_every: PositiveInt = Field(default=100, description="Steps between heat maps and histograms.")
