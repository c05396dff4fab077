"""Computes replicas of experts (`placement/replica_slots.py`). Each forward fetches the weights of replicas from the ranks
that own the experts.

Replicas have no parameters, so nothing must be kept equal. Backward sends the gradients of replicas to the owners, and adds
them to the experts' gradients. The optimizer, the gradient norm and checkpoints thus see each expert once.

A layer exchanges weights once in each pass, even if its dispatcher runs the experts several times. Forward issues this
exchange before all other exchanges of the layer, and waits for the weights when the first experts run. Backward sums the
gradients over all runs, and sends the sums after the layer's last exchange of rows. The layer's input passes through the
autograd node of the weights' exchange. So all ranks issue their collectives in the same order with every dispatcher.

From forward to backward, the weights of a replica stay in memory in the dtype of the rows.

Shape letters: T tokens, Q pairs, D hidden size, F hidden width of an expert, c replicas of a group on this rank, V
parameters of an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll, Pending, Splits
from moe_dist.comm.names import BACKWARD, REPLICAS
from moe_dist.moe.experts.experts import ExpertStack, RunStack
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.replica_slots import PlacementWithReplicas

Stacks = list[tuple[int, RunStack]]  # see `Replicas` in experts.py


@dataclass(frozen=True)
class Route:
    """Describes which weights of one group's experts a rank sends and receives in one layer.

    Attributes:
        send: Slots, in this rank's stack, of the experts whose weights are sent, in the order of the destination ranks. The
            weights of an expert may be sent to several ranks.
        splits: The number of experts whose weights are sent to each rank, and the number received from each rank.
    """

    group: str
    send: list[int]
    splits: Splits

    @classmethod
    def of(cls, placement: PlacementWithReplicas, layer: int, group: ExpertGroup, rank: int) -> "Route":
        """Makes the route of rank `rank`."""
        home, ranks, local = placement.rank_of_expert, range(placement.num_ranks), placement.local_experts(rank, group)
        replicas = placement.ordered(layer, group)
        sent = [[local.index(e) for e, host in replicas if host == to and home[e] == rank] for to in ranks]
        received = tuple(sum(home[e] == source and host == rank for e, host in replicas) for source in ranks)
        return cls(group.name, [slot for each in sent for slot in each], Splits(tuple(map(len, sent)), received))

    @property
    def num_replicas(self) -> int:
        """Number of the group's replicas on this rank."""
        return sum(self.splits.receive)


@dataclass(frozen=True)
class ReplicaWeights:
    """Fetches the weights of one layer's replicas to this rank. `routes` has one route for each group with replicas."""

    layer: str
    wire: AllToAll
    routes: tuple[Route, ...]

    @classmethod
    def of(cls, placement: PlacementWithReplicas, layer: int, name: str, wire: AllToAll) -> "ReplicaWeights | None":
        """Returns None for a layer without replicas."""
        groups = [group for group in placement.groups if placement.ordered(layer, group)]
        routes = tuple(Route.of(placement, layer, group, wire.rank) for group in groups)
        return cls(name, wire, routes) if routes else None

    def exchange(self, items: Tensor, route: Route, *, back: bool = False) -> Pending:
        """Issues the exchange of one group. It sends weights [., V] to the replicas. With `back`, it sends gradients from
        the replicas to the owners."""
        name, splits = (REPLICAS + BACKWARD, route.splits.reversed()) if back else (REPLICAS, route.splits)
        return self.wire.start(items, splits, name=name, layer=self.layer)

    def start(self, h_TD: Tensor, stacks: Callable[[str], ExpertStack]) -> tuple[Tensor, Callable[[], Stacks]]:
        """See `Replicas` in experts.py. Issues the exchange of the layer's weights."""
        found, pending = [stacks(route.group) for route in self.routes], list[Pending]()
        weights = [stack.get_parameter(name) for stack in found for name in stack.tensors]
        h_TD, *arriving = _Fetch.apply(h_TD, self, pending, *weights)  # pyright: ignore[reportGeneralTypeIssues]

        @cache
        def arrived() -> Stacks:
            """Waits for the weights in the first call."""
            for each in pending:
                each.wait()
            parts = zip(self.routes, found, arriving, strict=True)
            return [(route.num_replicas, partial(stack, weights=_cut(stack, all_cV))) for route, stack, all_cV in parts]

        return h_TD, arrived


def _cut(stack: ExpertStack, all_cV: Tensor) -> dict[str, Tensor]:
    """Splits all parameters [c, V] of replicas into gate and up [c, F, D], down [c, D, F] and any biases."""
    shapes = {name: stack.get_parameter(name).shape[1:] for name in stack.tensors}
    pieces = all_cV.split([shape.numel() for shape in shapes.values()], dim=1)
    # contiguous, like all stacks that the grouped product gets
    return {name: piece.unflatten(1, shapes[name]).contiguous() for name, piece in zip(shapes, pieces, strict=True)}


class _Fetch(torch.autograd.Function):
    """Forward issues one exchange for each group, which sends the weights of experts to the ranks of their replicas. It
    appends each exchange to `pending`, and returns each group's tensor [c, V] that will receive weights. The caller waits
    for the exchanges. Backward sends the weights' gradients back. The layer's input [T, D] passes through unchanged. So
    this node's backward runs on every rank, after all exchanges of rows."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, replicas: ReplicaWeights, pending: list[Pending], *weights: Tensor) -> Any:
        ctx.replicas, ctx.weights = replicas, weights  # not save_for_backward: backward needs no values
        for route, tensors in zip(replicas.routes, _of_groups(weights, replicas), strict=True):
            sent = torch.cat([_slots(each, route.send).to(h_TD.dtype).flatten(1) for each in tensors], dim=1)
            pending.append(replicas.exchange(sent, route))
        arriving = [each.received for each in pending]
        if not any(ctx.needs_input_grad[3:]):  # the experts are frozen, on all ranks
            ctx.mark_non_differentiable(*arriving)
        return h_TD.view_as(h_TD), *arriving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        replicas, found = ctx.replicas, list[Tensor | None]()
        if not any(ctx.needs_input_grad[3:]):
            return grad_TD, None, None, *(None for _ in ctx.weights)
        for route, weights, sent in zip(replicas.routes, _of_groups(ctx.weights, replicas), gradients, strict=True):
            returned = replicas.exchange(sent, route, back=True).wait()
            pieces = returned.split([each.shape[1:].numel() for each in weights], dim=1)
            found += [_with(weight, piece, route.send) for weight, piece in zip(weights, pieces, strict=True)]
        return grad_TD, None, None, *found


def _of_groups(tensors: Sequence[Tensor], replicas: ReplicaWeights) -> list[Sequence[Tensor]]:
    """Cuts a list of all groups' tensors into one list per group."""
    number = len(tensors) // len(replicas.routes)
    return [tensors[at : at + number] for at in range(0, len(tensors), number)]


def _slots(stack: Tensor, slots: Sequence[int]) -> Tensor:
    """Returns slots of a stack by slicing, because indexing by a list would sync with the host."""
    return torch.cat([stack[:0], *(stack[slot : slot + 1] for slot in slots)])


def _with(weight: Tensor, gradient: Tensor, slots: Sequence[int]) -> Tensor | None:
    """Returns the gradient of the stack `weight`, computed from the gradients of its replicas. If the stack already has a
    gradient, adds to it in place and returns None, as `working_copy.py` does."""
    if not slots or not weight.requires_grad:
        return None
    total = torch.zeros_like(weight) if weight.grad is None else weight.grad
    for slot, each in zip(slots, gradient, strict=True):  # in order, because `slots` may contain an expert twice
        total[slot] += each.view_as(total[slot]).to(total.dtype)
    return total if weight.grad is None else None
