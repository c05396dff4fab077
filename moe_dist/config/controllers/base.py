from collections.abc import Mapping

from moe_dist.config.base.section import KindSection


class ControllerSection(KindSection):
    """A controller: after each step it changes the router's selection biases, depending on the experts' loads in this
    step."""

    @property
    def targets(self) -> Mapping[str, float]:
        """Target of the mean number of true experts (not null or zero-computation) per token, by expert group."""
        return {}
