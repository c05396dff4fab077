from collections.abc import Iterator
from typing import Literal

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.dispatchers.base import FIX, KIND, DispatchSection


class KnownCountsDispatchSection(DispatchSection):
    """Send one row per (token, expert) pair, without a host sync. Works only if routing does not change the number of
    tokens that each rank sends to each expert."""

    builds = "moe_dist.moe.dispatch.known_counts:KnownCountsDispatcher"
    each_pair = True

    kind: Literal["known_counts"] = "known_counts"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        if reason := config.model.moe.router.counts_unknown():
            problem = f"the number of pairs of each rank and expert must be known before routing, but {reason}, {FIX}"
            yield Violation((KIND, "model.moe.router"), f"{self.name}: {problem}")
