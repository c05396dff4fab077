from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.controllers.base import ControllerSection


class LossFreeSection(ControllerSection):
    """After each step, raise the selection bias of experts whose load is below their group's mean load, and lower all other
    biases (DeepSeek-V3)."""

    builds = "moe_dist.moe.balance.loss_free:LossFree"

    kind: Literal["loss_free"] = "loss_free"
    rate: PositiveFloat = Field(default=1e-3, description="Amount by which a step raises or lowers a bias.")
