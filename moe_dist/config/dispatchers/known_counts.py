from collections.abc import Iterator
from typing import Literal

from moe_dist.config.dispatchers.base import KIND, DispatchSection
from moe_dist.config.section import Violation, WholeConfig


class KnownCountsDispatchSection(DispatchSection):
    """One row for each (token, expert), without a host sync; for routers whose counts are known beforehand."""

    kind: Literal["known_counts"] = "known_counts"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if unknown := config.model.moe.router.counts_unknown():
            problem = f"needs the number of pairs of each rank and expert beforehand, and {unknown}; take {KIND}=all_to_all"
            yield Violation((KIND, "model.moe.router"), f"{self.name}: {problem}")
