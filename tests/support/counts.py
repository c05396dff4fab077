"""Counts of a step for tests that need only a few fields."""

from typing import Any

from moe_dist.moe.routing.counts import DepthCounts, RoutingCounts


def counts_with(**fields: Any) -> RoutingCounts[Any]:
    """Those fields; the others are None, so that whoever reads one fails."""
    return RoutingCounts(*[None] * 4)._replace(**fields)


def depth_counts_with(**fields: Any) -> RoutingCounts[Any]:
    """Those fields of mixture of depths; the others are None."""
    return counts_with(depth=DepthCounts(*[None] * 5)._replace(**fields))
