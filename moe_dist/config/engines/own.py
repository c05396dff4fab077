from typing import ClassVar, Literal

from moe_dist.config.engines.base import EngineSection


class OwnEngineSection(EngineSection):
    """This project's own engine: expert parallelism with DDP or FSDP2."""

    kind: Literal["moe_dist"] = "moe_dist"

    planned: ClassVar[bool] = True
