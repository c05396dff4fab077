from typing import Any

from moe_dist.config.base.section import Section


class SinkSection(Section):
    """A destination of a run's records, the measured values of each step."""

    kind: Any
