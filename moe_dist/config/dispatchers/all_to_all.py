from typing import Literal

from pydantic import PositiveInt

from moe_dist.config.dispatchers.base import DispatchSection


class AllToAllDispatchSection(DispatchSection):
    """One row for each (token, destination rank), whatever the number of experts it takes there."""

    kind: Literal["all_to_all"] = "all_to_all"
    overlap: bool = False
    """Compute own rows and the shared expert while remote rows are in flight, in backward too. It doubles the number of
    expert GEMMs."""
    chunks: PositiveInt = 1
    """Ranges of tokens that a layer runs in: one is dispatched while the one before it is computed."""
