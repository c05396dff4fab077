from typing import Literal

from pydantic import PositiveInt

from moe_dist.config.sinks.base import SinkSection


class JsonlSinkSection(SinkSection):
    """metrics.jsonl in the run folder, one record a step."""

    kind: Literal["jsonl"] = "jsonl"
    arrays_every: PositiveInt = 1
    """Steps between lines with the choices of every expert; 64 layers x 128 experts take 70 KB a line."""
