from typing import Any

from moe_dist.config.section import Section


class SinkSection(Section):
    """A destination of the records of a run."""

    kind: Any
