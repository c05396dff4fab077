"""Counts of a step for tests that need only a few of their fields."""

from typing import Any

from moe_dist.moe.routing.counts import DepthCounts, RoutingCounts


def counts_with(**fields: Any) -> RoutingCounts[Any]:
    """Returns counts with these fields; all others are None, so that reading one fails."""
    return RoutingCounts(*[None] * 4)._replace(**fields)


def depth_counts_with(**fields: Any) -> RoutingCounts[Any]:
    """Returns counts with these fields of mixture of depths; all others are None."""
    return counts_with(depth=DepthCounts(*[None] * 5)._replace(**fields))
