"""Counts of a step for tests that need only a few fields."""

from typing import Any

from moe_dist.moe.routing.counts import StepCounts


def counts_with(**fields: Any) -> StepCounts[Any]:
    """Returns counts with these fields. All others are None, so that a read of them fails."""
    return StepCounts(*[None] * len(StepCounts._fields))._replace(**fields)
