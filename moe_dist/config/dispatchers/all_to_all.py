from typing import Literal

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.dispatchers.base import DispatchSection


class AllToAllDispatchSection(DispatchSection):
    """Send each token at most once to a rank, even if the token chooses several experts on that rank."""

    builds = "moe_dist.moe.dispatch.choice:all_to_all"
    replicas = True

    kind: Literal["all_to_all"] = "all_to_all"
    overlap: bool = False
    """During the all-to-all, compute the shared expert and the rows whose token and expert are on the same rank, in forward
    and backward. The overlap doubles the number of expert GEMMs."""
    chunks: PositiveInt = 1
    """Number of chunks into which a layer divides its tokens. It dispatches a chunk while it computes the previous one."""
