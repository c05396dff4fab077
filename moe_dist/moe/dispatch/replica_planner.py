"""Plans the dispatch of layers where some experts have replicas on other ranks (`placement/replica_slots.py`).
Shape letters: N (token, expert) pairs, E true experts.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_dist.moe.routing.types import Assignments


class ReplicaPlanner:
    """Takes the place of a dispatcher's planner: it sends this rank's tokens to the replicas that serve this rank. The
    planner of a layer treats each replica as a separate expert.

    Args:
        plain: The dispatcher's planner until now, for layers without replicas.
        of_layer: By name of the layer, the id of each expert's slot (int64 [E + 1]; the last is that of absent pairs), and
            a planner of the same kind for the layer's slots.
    """

    def __init__(self, plain: Any, of_layer: Mapping[str, tuple[Tensor, Any]]) -> None:
        self._plain, self._of_layer = plain, of_layer

    def plan(self, assignments: Assignments, num_tokens: int, layer: str) -> Any:
        if layer not in self._of_layer:
            return self._plain.plan(assignments, num_tokens, layer)
        slot_E, planner = self._of_layer[layer]
        # the index -1 of absent pairs means the last
        return planner.plan(assignments._replace(expert_N=slot_E[assignments.expert_N]), num_tokens, layer)

    def chunk_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """See `DispatchPlanner.chunk_lengths`; the same for all layers."""
        return self._plain.chunk_lengths(num_tokens)
