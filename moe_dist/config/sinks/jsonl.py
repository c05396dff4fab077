from typing import Literal

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.sinks.base import SinkSection


class JsonlSinkSection(SinkSection):
    """Write one record per step to metrics.jsonl in the run folder."""

    builds = "moe_dist.monitor.sinks.jsonl:JsonlSink"

    kind: Literal["jsonl"] = "jsonl"
    arrays_every: PositiveInt = 1
    """Number of steps between two records that include each expert's number of choices. With 64 layers of 128 experts,
    these numbers take 70 KB per record."""
