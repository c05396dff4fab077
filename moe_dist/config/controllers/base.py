from collections.abc import Mapping

from moe_dist.config.base.section import KindSection


class ControllerSection(KindSection):
    """A controller, which changes the router's selection biases after each step, depending on the experts' loads."""

    @property
    def targets(self) -> Mapping[str, float]:
        """Maps expert groups to targets of the mean number of true (not null or zero-computation) experts per token."""
        return {}
