from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.sinks.base import SinkSection


class TensorBoardSinkSection(SinkSection):
    """Write TensorBoard event files to the run folder."""

    builds = "moe_dist.monitor.sinks.tensorboard:TensorBoardSink"

    kind: Literal["tensorboard"] = "tensorboard"
    pictures_every: PositiveInt = Field(default=100, description="Steps between two sets of heat maps and histograms.")
    mean_over: PositiveInt = Field(
        default=10, description="Steps whose mean is one point of the curves of the routing (moe/, mixture_of_depths/)."
    )
