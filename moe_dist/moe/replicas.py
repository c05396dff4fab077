"""Computes replicas of experts (`placement/replicas.py`). Each forward fetches the replicas' weights from the experts' own
slots.

Replicas have no parameters that must be kept equal: backward sends the gradients of replicas to the experts' own slots and
adds the gradients there, and the optimizer, the gradient norm and checkpoints see each expert once. The exchange of weights
is part of the autograd graph between dispatch and experts, so that every rank issues its collectives in the same order.

The weights of a replica stay in memory, in the dtype of the rows, from forward to backward.

Shape letters: R rows, Q pairs, D hidden size, F hidden width of an expert, c replicas of a group on this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.names import BACKWARD, REPLICAS
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.experts import Activation, Experts, ExpertStack, Inputs, choose_gemm
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.replicas import PlacementWithReplicas
from moe_dist.placement.roles import group_module

TENSORS = ("gate", "up", "down")


@dataclass(frozen=True)
class Route:
    """Says which weights of one group's experts one rank sends and receives, in one layer.

    Attributes:
        group: Name of the group.
        send: Slots (in this rank's stack) of the experts whose weights are sent, in the order of the destination ranks. An
            expert may be sent to several ranks.
        splits: Numbers of experts whose weights are sent to and received from each rank.
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
    """Fetches the weights of one layer's replicas to this rank. `routes` has the groups with replicas on any rank."""

    layer: str
    wire: AllToAll
    routes: tuple[Route, ...]

    @classmethod
    def of(cls, placement: PlacementWithReplicas, layer: int, name: str, wire: AllToAll) -> "ReplicaWeights | None":
        """Returns None for a layer without replicas."""
        groups = [group for group in placement.groups if placement.ordered(layer, group)]
        routes = tuple(Route.of(placement, layer, group, wire.rank) for group in groups)
        return cls(name, wire, routes) if routes else None


class ExpertsWithReplicas(Experts):
    """FFN experts of this rank and, in layers with replicas, the replicas on this rank. For arguments see `Experts`.

    Attributes:
        replicas: Fetches the weights of this rank's replicas; None for a layer without replicas.
    """

    replicas: ReplicaWeights | None = None

    def forward(self, dispatched: DispatchedRows, plan: PairLayout, *, recompute: bool = False) -> Tensor:
        """See `Experts.forward`. The input rows of replicas come after the rows of the rank's own slots."""
        found = self.replicas
        if found is None:
            return super().forward(dispatched, plan, recompute=recompute)
        own = [(count, self.get_submodule(group_module(name))) for name, count in self.local]
        stacks: list[Any] = [self.get_submodule(group_module(route.group)) for route in found.routes]
        weights = [getattr(stack, name) for stack in stacks for name in TENSORS]
        rows_RD, *fetched = _Fetch.apply(dispatched.rows_RD, found, *weights)  # pyright: ignore[reportGeneralTypeIssues]
        parts = zip(found.routes, stacks, _of_groups(fetched), strict=True)
        more = [(route.num_replicas, partial(_run, stack, *three)) for route, stack, three in parts if route.num_replicas]
        return self._run(replace(dispatched, rows_RD=rows_RD), plan, [*own, *more], recompute=recompute)


def _run(
    stack: ExpertStack,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x_QD: Inputs,
    counts: Sequence[int],
    activate: Activation,
) -> Tensor:
    """Computes replicas with the weights `gate`, `up` and `down`, by the function that `stack` would use for its
    experts."""
    like = x_QD[0] if isinstance(x_QD, tuple) else x_QD
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "widths": stack.widths}
    swiglu: Callable[..., Tensor] = choose_gemm(stack.gemm, num_experts=len(counts), **options)
    return swiglu(x_QD, gate, up, down, counts, activate)


class _Fetch(torch.autograd.Function):
    """Forward sends the weights of experts to the ranks of their replicas, one exchange for each group; backward sends the
    weights' gradients back. The rows [R, D] pass through unchanged, so that this node's backward runs on every rank, after
    the backward of the experts and before the backward of dispatch."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, replicas: ReplicaWeights, *weights: Tensor) -> Any:
        ctx.replicas, ctx.weights = replicas, weights  # not save_for_backward: backward needs no values
        found: list[Tensor] = []
        for route, three in zip(replicas.routes, _of_groups(weights), strict=True):
            sent = torch.cat([_slots(each, route.send).to(rows_RD.dtype).flatten(1) for each in three], dim=1)
            arrived = replicas.wire.exchange(sent, route.splits, name=REPLICAS, layer=replicas.layer)
            shapes = [each.shape[1:] for each in three]
            pieces = arrived.split([shape.numel() for shape in shapes], dim=1)
            # contiguous, like the other weight stacks of the grouped product
            found += [piece.unflatten(1, shape).contiguous() for piece, shape in zip(pieces, shapes, strict=True)]
        return rows_RD.view_as(rows_RD), *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        replicas, found = ctx.replicas, list[Tensor | None]()
        if not any(ctx.needs_input_grad[2:]):  # the experts are frozen, on all ranks
            return grad_RD, None, *(None for _ in ctx.weights)
        for route, weights, three in zip(replicas.routes, *map(_of_groups, (ctx.weights, gradients)), strict=True):
            sent = torch.cat([each.flatten(1) for each in three], dim=1)
            back = route.splits.reversed()
            returned = replicas.wire.exchange(sent, back, name=REPLICAS + BACKWARD, layer=replicas.layer)
            pieces = returned.split([each.shape[1:].numel() for each in three], dim=1)
            found += [_with(weight, piece, route.send) for weight, piece in zip(weights, pieces, strict=True)]
        return grad_RD, None, *found


def _of_groups(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Cuts a list of all groups' tensors into one list per group."""
    return [tensors[at : at + len(TENSORS)] for at in range(0, len(tensors), len(TENSORS))]


def _slots(stack: Tensor, slots: Sequence[int]) -> Tensor:
    """Returns slots of a stack by slices, because a list as index would sync with the host."""
    return torch.cat([stack[:0], *(stack[slot : slot + 1] for slot in slots)])


def _with(weight: Tensor, gradient: Tensor, slots: Sequence[int]) -> Tensor | None:
    """Returns the gradient of the stack `weight`, made of the gradients of its replicas. If the stack has a gradient
    already, adds to the stack's gradient in place and returns None, as `experts._WorkingCopy` does."""
    if not slots or not weight.requires_grad:
        return None
    total = torch.zeros_like(weight) if weight.grad is None else weight.grad
    for slot, each in zip(slots, gradient, strict=True):  # in a fixed order, because `slots` may name an expert twice
        total[slot] += each.view_as(total[slot]).to(total.dtype)
    return total if weight.grad is None else None
