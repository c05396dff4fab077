from typing import Literal

from pydantic import Field

from moe_dist.config.sinks.base import SinkSection


class MlflowSinkSection(SinkSection):
    """Send records to an MLflow tracking server."""

    builds = "moe_dist.monitor.sinks.mlflow:MlflowSink"

    kind: Literal["mlflow"] = "mlflow"
    experiment: str = Field(description="Name of the MLflow experiment; created if the server has none of that name.")
    uri: str | None = Field(default=None, description="Address of the tracking server. null: MLFLOW_TRACKING_URI.")
