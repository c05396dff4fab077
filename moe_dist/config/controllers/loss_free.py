from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.controllers.base import ControllerSection


class LossFreeSection(ControllerSection):
    """Balance a group's true experts by the sign of each one's distance from the mean load (DeepSeek-V3)."""

    kind: Literal["loss_free"] = "loss_free"
    rate: PositiveFloat = Field(default=1e-3, description="By how much a bias moves in a step.")
