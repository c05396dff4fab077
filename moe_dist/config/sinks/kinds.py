from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PathText, PositiveInt
from moe_dist.config.sinks.base import SinkSection


class ConsoleSinkSection(SinkSection):
    """Show a progress bar on a terminal. Without a terminal, print lines of text instead."""

    builds = "moe_dist.monitor.sinks.console:ConsoleSink"

    kind: Literal["console"] = "console"
    every: PositiveInt = Field(default=10, description="Steps between two plain lines.")


class JsonlSinkSection(SinkSection):
    """Write one record per step to metrics.jsonl in the run folder."""

    builds = "moe_dist.monitor.sinks.jsonl:JsonlSink"

    kind: Literal["jsonl"] = "jsonl"
    arrays_every: PositiveInt = 1
    """Number of steps between two records that include each expert's number of choices. With 64 layers of 128 experts,
    these numbers take 70 KB per record."""


class MlflowSinkSection(SinkSection):
    """Send records to an MLflow tracking server."""

    builds = "moe_dist.monitor.sinks.trackers:MlflowSink"

    kind: Literal["mlflow"] = "mlflow"
    experiment: str = Field(description="Name of the MLflow experiment; created if the server has none of that name.")
    uri: str | None = Field(default=None, description="Address of the tracking server. null: MLFLOW_TRACKING_URI.")


class PrometheusSinkSection(SinkSection):
    """Write the latest values to a textfile for Prometheus' node exporter. Each step replaces the file."""

    builds = "moe_dist.monitor.sinks.prometheus:PrometheusSink"

    kind: Literal["prometheus"] = "prometheus"
    path: PathText | None = None
    """Path of the textfile. null: metrics.prom in the run folder."""


class TensorBoardSinkSection(SinkSection):
    """Write TensorBoard event files to the run folder."""

    builds = "moe_dist.monitor.sinks.tensorboard:TensorBoardSink"

    kind: Literal["tensorboard"] = "tensorboard"
    pictures_every: PositiveInt = Field(default=100, description="Steps between two sets of heat maps and histograms.")
    mean_over: PositiveInt = Field(
        default=10, description="Steps whose mean is one point of the curves of the routing (moe/, mixture_of_depths/)."
    )


class WandbSinkSection(SinkSection):
    """Send records to Weights & Biases."""

    builds = "moe_dist.monitor.sinks.trackers:WandbSink"

    kind: Literal["wandb"] = "wandb"
    project: str = Field(description="Name of the Weights & Biases project.")
    mode: Literal["online", "offline"] = "online"
    """online sends records over the network. offline only writes them to the run folder."""
