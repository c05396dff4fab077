"""What the sections of sinks share."""

from typing import Any

from moe_dist.config.section import Section


class SinkSection(Section):
    """Where records go."""

    kind: Any
