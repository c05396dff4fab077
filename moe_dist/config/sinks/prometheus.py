from typing import Literal

from moe_dist.config.section import PathText
from moe_dist.config.sinks.base import SinkSection


class PrometheusSinkSection(SinkSection):
    """A textfile for Prometheus' node exporter, replaced at each step."""

    kind: Literal["prometheus"] = "prometheus"
    path: PathText | None = None
    """Textfile to replace at each step; default metrics.prom in the run folder."""
