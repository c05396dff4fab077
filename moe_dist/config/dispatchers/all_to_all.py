from typing import Literal

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.dispatchers.base import DispatchSection


class AllToAllDispatchSection(DispatchSection):
    """Send one row per (token, destination rank), also if the token takes several experts on that rank."""

    builds = "moe_dist.moe.dispatch.choice:all_to_all"
    replicas = True

    kind: Literal["all_to_all"] = "all_to_all"
    overlap: bool = False
    """Compute the rank's own rows and the shared expert during the all-to-all of all other rows, in forward and
    backward. The overlap doubles the number of expert GEMMs."""
    chunks: PositiveInt = 1
    """Number of chunks into which a layer cuts its tokens. The layer dispatches a chunk while it computes the previous
    chunk."""
