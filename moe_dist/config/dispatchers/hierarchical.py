from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt

from moe_dist.config.dispatchers.base import DispatchSection, either
from moe_dist.config.section import Violation, WholeConfig


class HierarchicalDispatchSection(DispatchSection):
    """One row for each (token, destination node) between nodes, then one for each (token, rank) inside the node."""

    kind: Literal["hierarchical"] = "hierarchical"
    ranks_per_node: PositiveInt = Field(description="Neighbouring ranks that make a node; divides parallel.ep.")

    @property
    def node_size(self) -> int:
        return self.ranks_per_node

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        ep = config.parallel.ep
        if ep % self.ranks_per_node == 0:
            return
        near = [str(ranks) for ranks in range(1, ep + 1) if ep % ranks == 0]
        problem = (
            f"parallel.dispatch.ranks_per_node={self.ranks_per_node}: an EP group of parallel.ep={ep} ranks cannot be cut "
            f"into nodes of so many; take {either(near)}, or another parallel.ep"
        )
        yield Violation(("parallel.dispatch.ranks_per_node", "parallel.ep"), problem)
