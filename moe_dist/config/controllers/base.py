from collections.abc import Mapping
from typing import Any

from moe_dist.config.base.section import Section


class ControllerSection(Section):
    """A controller: after each step it changes the router's selection biases, depending on the experts' loads in this
    step."""

    kind: Any

    @property
    def targets(self) -> Mapping[str, float]:
        """Target of the mean number of true experts (not null or zero-computation) per token, by expert group."""
        return {}
