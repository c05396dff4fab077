from typing import Literal

from moe_dist.config.dispatchers.base import KIND, DispatchSection
from moe_dist.config.section import Violation, WholeConfig


class KnownCountsDispatchSection(DispatchSection):
    """One row for each (token, expert), without a host sync; for routers whose counts are known beforehand."""

    kind: Literal["known_counts"] = "known_counts"

    def violations_in(self, config: WholeConfig) -> list[Violation]:
        unknown = config.model.moe.router.counts_unknown()
        problem = (
            f"{self.name}: needs the number of pairs of each rank and expert beforehand, and {unknown}; take "
            f"{KIND}=all_to_all"
        )
        return [Violation((KIND, "model.moe.router"), problem)] if unknown else []
