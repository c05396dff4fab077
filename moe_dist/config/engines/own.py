from typing import Literal

from moe_dist.config.engines.base import EngineSection


class OwnEngineSection(EngineSection):
    """This project's own engine, which combines expert parallelism with DDP or FSDP2."""

    builds = "moe_dist.train.build.training:own_engine"
    memory = "moe_dist.plan.memory:rank_memory"
    planned = True

    kind: Literal["moe_dist"] = "moe_dist"
