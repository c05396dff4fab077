"""Dispatches as `all_to_all` does in layers where some experts have replicas on other ranks (`placement/replicas.py`).
Shape letters: N (token, expert) pairs, E true experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.planning import Planner
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.replicas import PlacementWithReplicas


class ReplicaDispatcher(AllToAllDispatcher):
    """Sends this rank's tokens to the replicas that serve this rank. The planner treats each replica as a separate expert.

    Args:
        layers: Names of the MoE layers, in the order of `placement.replicas`.
    """

    def __init__(
        self,
        placement: PlacementWithReplicas,
        wire: AllToAll,
        *,
        layers: Sequence[str],
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(placement, wire, **options)
        self._of_layer: dict[str, tuple[Tensor, Planner]] = {}  # ids of each expert's slot [E + 1], and planner
        for layer, name in enumerate(layers):
            if placement.replicas[layer]:
                ids = [*placement.id_of_expert(layer, wire.rank), ABSENT]  # expert -1 (absent) reads the last entry
                self._of_layer[name] = torch.tensor(ids, device=device), self._planner_for(placement.in_layer(layer))

    def plan(self, assignments: Assignments, num_tokens: int, *, layer: str = "") -> AllToAllPlan:
        """See `AllToAllDispatcher.plan`."""
        if layer not in self._of_layer:
            return super().plan(assignments, num_tokens, layer=layer)
        ids, planner = self._of_layer[layer]
        (plan,), _ = planner.plan(assignments._replace(expert_N=ids[assignments.expert_N]), num_tokens, layer)
        return plan
