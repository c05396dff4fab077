from collections.abc import Mapping
from typing import Any

from moe_dist.config.section import Section


class ControllerSection(Section):
    """The rule by which the load of a step changes the router's selection bias."""

    kind: Any

    @property
    def targets(self) -> Mapping[str, float]:
        """The mean number of true experts per token that the controller aims at, by group."""
        return {}
