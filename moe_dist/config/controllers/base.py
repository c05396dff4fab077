"""The base of the sections of controllers."""

from collections.abc import Mapping
from typing import Any

from moe_dist.config.section import Section


class ControllerSection(Section):
    """How the load of a step moves the router's selection bias."""

    kind: Any

    @property
    def targets(self) -> Mapping[str, float]:
        """Target of true experts per token, by group."""
        return {}
