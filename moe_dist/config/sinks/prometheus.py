from typing import Literal

from moe_dist.config.base.section import PathText
from moe_dist.config.sinks.base import SinkSection


class PrometheusSinkSection(SinkSection):
    """Write the latest values to a textfile for Prometheus' node exporter. Each step replaces the file."""

    builds = "moe_dist.monitor.sinks.prometheus:PrometheusSink"

    kind: Literal["prometheus"] = "prometheus"
    path: PathText | None = None
    """Path of the textfile. null: metrics.prom in the run folder."""
