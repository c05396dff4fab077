"""What a controller's section says of its kind."""

from collections.abc import Mapping
from typing import Any

from moe_dist.config.section import Section


class ControllerSection(Section):
    """How the load of a step moves the router's selection bias."""

    kind: Any

    @property
    def targets(self) -> Mapping[str, float]:
        """True experts a token at which groups are held, by group."""
        return {}
