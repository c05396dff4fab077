"""Measures balance_efficiency: the throughput with the model's own routing, divided by the throughput when an equal number
of (token, expert) pairs is spread evenly over the experts.

Published MoE throughputs are often measured with evenly spread pairs. Multiply such a throughput by balance_efficiency to
get the throughput with real routing. Only the forward pass is timed, on held-out batches. The measurement leaves gradients,
random generators, loader and routers unchanged.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.comm.collectives import max_over
from moe_dist.comm.names import SLOWEST_RANK
from moe_dist.data.batch import Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import ABSENT, Routing, RoutingCache
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.objective.loss import forward

REPEATS = 5


@dataclass(frozen=True)
class BalanceEfficiency:
    """The result of one balance measurement."""

    timed: float | None  # the balance efficiency; None if it was not measured
    note: str  # how the balance efficiency was measured, or why it was not


class EvenRouter(nn.Module):
    """Produces as many pairs as `router`, with the same weights, but assigns the pairs to the group's experts in turn."""

    def __init__(self, router: nn.Module, groups: Sequence[ExpertGroup]) -> None:
        super().__init__()
        self.router = router
        self.groups = tuple(groups)

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        routing = self.router(h_TD, group_T, cache)
        assignments = routing.assignments
        expert_N = assignments.expert_N
        group_N = group_T[assignments.token_N]
        even_N = torch.full_like(expert_N, ABSENT)
        for index, group in enumerate(self.groups):
            mine_N = (expert_N != ABSENT) & (group_N == index)
            # The i-th pair of a group gets expert i modulo n. A token's experts differ, because its pairs are consecutive.
            turn_N = (mine_N.to(torch.int64).cumsum(0) - 1) % group.num_experts
            even_N = torch.where(mine_N, group.first_expert + turn_N, even_N)  # a mask as index would sync with the host
        return routing._replace(assignments=assignments._replace(expert_N=even_N, counts_WE=None))


@torch.no_grad()
def balance_efficiency(
    model: Transformer, batches: Sequence[Batch], *, group_of_modality: Tensor, placement: ExpertPlacement, mesh: Mesh
) -> BalanceEfficiency:
    """Times forward passes, alternately with the model's own routing and with even routing. Returns the median time with
    even routing, divided by the median time with the model's own routing. The slowest rank determines each measured time.

    Collective. Measures nothing on a CPU with more ranks than cores, because the times would then depend on the operating
    system's scheduler.
    """
    if note := ranks_outnumber_cores(mesh):
        return BalanceEfficiency(None, note)
    if not batches:
        return BalanceEfficiency(None, "not timed: there are no held-out batches")
    real: list[float] = []
    even: list[float] = []
    for repeat in range(REPEATS + 1):
        for times, context in ((real, None), (even, placement.groups)):
            seconds = _timed(model, batches, group_of_modality, context, mesh)
            if repeat:  # the first repeat is a warm-up
                times.append(seconds)
    ratio = statistics.median(even) / statistics.median(real)
    note = f"forward of {len(batches)} held-out batches, median of {REPEATS}, slowest rank"
    if ratio > 1.0:
        note += "; above 1 by noise, since even routing is the fastest: other work may share the machine"
    return BalanceEfficiency(ratio, note)


def ranks_outnumber_cores(mesh: Mesh) -> str:
    """Returns the reason why nothing is timed if ranks on a CPU outnumber its cores; otherwise returns an empty text."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
    cores = len(os.sched_getaffinity(0))
    outnumbered = mesh.device.type == "cpu" and ranks_here > cores
    return f"not timed: {ranks_here} ranks share {cores} cores" if outnumbered else ""


@contextmanager
def even_routing(model: Transformer, groups: Sequence[ExpertGroup]) -> Iterator[None]:
    """Replaces every MoE layer's router by an `EvenRouter` during the `with` block."""
    layers = model.moe_modules()
    routers = [layer.router for layer in layers]
    for layer in layers:
        layer.router = EvenRouter(layer.router, groups)
    try:
        yield
    finally:
        for layer, router in zip(layers, routers, strict=True):
            layer.router = router


def _timed(
    model: Transformer,
    batches: Sequence[Batch],
    group_of_modality: Tensor,
    groups: Sequence[ExpertGroup] | None,
    mesh: Mesh,
) -> float:
    """Returns the slowest rank's seconds for the forward passes of all batches. Syncs with the device before and after."""
    training = model.training
    model.eval()
    with even_routing(model, groups) if groups is not None else nullcontext():
        _synchronise(mesh.device)
        begin = time.perf_counter()
        for batch in batches:
            forward(model, batch.to(mesh.device), group_of_modality)
        _synchronise(mesh.device)
        seconds = time.perf_counter() - begin
    model.train(training)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=mesh.device)
    return float(max_over(slowest, mesh.world, name=SLOWEST_RANK, tracker=mesh.tracker).item())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
