"""The base of the sections of sinks."""

from typing import Any

from moe_dist.config.section import Section


class SinkSection(Section):
    """Where records go."""

    kind: Any
