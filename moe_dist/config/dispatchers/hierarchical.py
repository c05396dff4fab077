from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PositiveInt, Violation, WholeConfig
from moe_dist.config.dispatchers.base import DispatchSection, either


class HierarchicalDispatchSection(DispatchSection):
    """Send each token at most once to a node, then, inside the node, at most once to a rank."""

    builds = "moe_dist.moe.dispatch.hierarchical:HierarchicalDispatcher"
    replicas = True

    kind: Literal["hierarchical"] = "hierarchical"
    ranks_per_node: PositiveInt = Field(description="Number of consecutive ranks on one node. Must divide parallel.ep.")

    @property
    def node_size(self) -> int:
        return self.ranks_per_node

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        ep, key = config.parallel.ep, "parallel.dispatch.ranks_per_node"
        if ep % self.ranks_per_node == 0:
            return
        divisors = either([str(ranks) for ranks in range(1, ep + 1) if ep % ranks == 0])
        problem = f"{key}={self.ranks_per_node}: does not divide parallel.ep={ep}; take {divisors}, or change parallel.ep"
        yield Violation((key, "parallel.ep"), problem)
