from collections.abc import Mapping
from typing import Any

from moe_dist.config.section import Section


class ControllerSection(Section):
    """A controller: after each step it changes the router's selection biases, depending on the experts' loads in it."""

    kind: Any

    @property
    def targets(self) -> Mapping[str, float]:
        """By expert group, the mean number of true experts (not null or zero-computation ones) per token to aim at."""
        return {}
