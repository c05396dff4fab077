"""Tests expert choice on N ranks. Recompute is bit-equal, known counts need no sync, ranks with different numbers of tokens
choose as one rank does, and calibration covers all ranks. test_kinds_on_ranks.py compares N ranks with one process."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import CHOICE_LOGITS
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.moe.routing.types import GlobalBatchInfo, RoutingCache, RoutingRequest
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.evaluation.evaluator import calibrate
from tests.support.cover import full
from tests.support.layouts import LAYERS, SEQUENCES, Layout, batch_of, build
from tests.support.one_rank_layer import one_rank_layer
from tests.support.syncs import host_syncs
from tests.support.worlds import RankContext

T, D = 20, 8
GROUPS = (ExpertGroup("text", 4, 0, 1, 8, 0, ("text",)), ExpertGroup("image", 4, 0, 1, 8, 4, ("image",)))
PLACEMENTS = {
    1: ExpertPlacement(GROUPS, (tuple(range(8)),)),
    4: ExpertPlacement(GROUPS, ((0, 4), (1, 5), (2, 6), (3, 7))),
}


def syncs(rank: RankContext, recompute: str) -> tuple[list[str], list[str]]:
    """Returns the host's reads of tensors and the named syncs in a layer's forward and backward."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    comm_stats, placement = CommStats(events=[]), PLACEMENTS[rank.world_size]
    wire = AllToAll(mesh.ep, comm_stats)
    ranks = tuple(range(rank.world_size))
    scope = SelectionScope(ranks=(rank.rank,), ep_ranks=ranks)
    context = RouterContext(D, GROUPS, known_counts=True, selection_scope=scope)
    router = ExpertChoiceRouter(context, noise=1.0, causal="threshold")
    options: dict[str, Any] = {"placement": placement, "rank": rank.rank, "recompute": recompute}
    dispatcher: Any = KnownCountsDispatcher(DispatchContext(placement, wire))
    layer = one_rank_layer(router, D, norm=torch.nn.RMSNorm(D), dispatcher=dispatcher, **options)
    # Each rank knows the groups of all ranks' tokens, and computes all counts from them. Rank 1 has only padding.
    groups = [torch.randint(-1, 2, (T,), generator=torch.Generator().manual_seed(r)) for r in ranks]
    if rank.world_size > 1:
        groups[1] = torch.full((T,), -1)
    members = tuple(tuple(int((group_T == index).sum()) for index in range(2)) for group_T in groups)
    batch_info = GlobalBatchInfo(3, 0, rank.rank, (T,) * rank.world_size, members)
    x_TD = torch.randn(T, D, requires_grad=True)
    plans: list[Any] = []
    reads: list[str] = []
    plan = dispatcher.plan
    dispatcher.plan = lambda *args, **options: plans.append(plan(*args, **options)) or plans[-1]
    for _ in range(2):
        with host_syncs() as seen:
            y_TD, _ = layer(x_TD, groups[rank.rank], RoutingRequest(batch_info))
            y_TD.sum().backward()
        reads += seen
    assert len(plans) == 2
    return reads, [event for event in comm_stats.events or [] if event.startswith("sync")]


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_layer_whose_counts_are_known_waits_for_nothing(
    run_in_world: Callable[..., list[Any]], world_size: int, recompute: str
) -> None:
    assert run_in_world(world_size, syncs, recompute) == [([], [])] * world_size


def uneven(rank: RankContext) -> tuple[list[list[bool]], list[list[bool]]]:
    """Ranks with 5, 0, 9 and 2 tokens choose in one scope over all ranks. Returns their choices, and the choices that
    one rank with all tokens makes."""
    lengths = (5, 0, 9, 2)
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    generator = torch.Generator().manual_seed(5)
    # integers make products exact, so that scores of different tokens tie
    h_TD = torch.randint(-2, 3, (sum(lengths), D), generator=generator).double()
    group_T = torch.randint(-1, 2, (sum(lengths),), generator=generator)
    options: dict[str, Any] = {"capacity": 0.3, "causal": "threshold"}
    comm_stats = CommStats(events=[])
    where = SelectionScope("world", mesh.world, (0, 1, 2, 3), rank.rank, mesh.ep_ranks, comm_stats)
    contexts = [RouterContext(D, GROUPS, selection_scope=each) for each in (where, SelectionScope())]
    routers = [ExpertChoiceRouter(each, **options).double() for each in contexts]
    for router in routers:
        for parameter in router.parameters():
            torch.nn.init.constant_(parameter, 1.0)
            parameter.data += torch.arange(parameter.numel()).view_as(parameter) % 3
    first = sum(lengths[: rank.rank])
    mine = slice(first, first + lengths[rank.rank])
    members = tuple(
        tuple(int((part == index).sum()) for index in range(2)) for part in group_T.split(lengths)
    )  # fmt: skip
    batch_info = GlobalBatchInfo(0, 0, rank.rank, lengths, members)
    taken = []
    for router, h, group, given in ((routers[0], h_TD[mine], group_T[mine], batch_info), (routers[1], h_TD, group_T, None)):
        cache = RoutingCache(batch_info=given)
        router(h, group, cache)
        taken.append(cache.choice.taken_TE.tolist())
    assert (comm_stats.events, comm_stats.metadata_bytes) == ([CHOICE_LOGITS], 3 * max(lengths) * 8 * 8)
    return taken[0], taken[1][mine]


def test_ranks_of_different_lengths_choose_alike(run_in_world: Callable[..., list[Any]]) -> None:
    for got, expected in run_in_world(4, uneven):
        assert got == expected


def calibrated(rank: RankContext, layout: Layout) -> dict[str, np.ndarray]:
    """Returns this rank's thresholds after a calibration that gave this rank a part of two micro-batches."""
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
    model, each = build(layout, mesh, CommStats()).model, SEQUENCES // rank.world_size
    batches = [batch_of(0, micro, rank.rank * each, each) for micro in range(2)]
    calibrate(model, batches, group_of_modality=torch.tensor([0, 1]), world=mesh.world, steps=0)
    return {name: buffer.numpy().copy() for name, buffer in model.named_buffers() if name.endswith("threshold")}


@pytest.mark.parametrize(
    ("choice", "mixture_of_depths", "thresholds"), [("world", None, 2 * LAYERS), full(None, "world", 1)]
)
def test_calibration_is_over_all_ranks(
    run_in_world: Callable[..., list[Any]], choice: str | None, mixture_of_depths: str | None, thresholds: int
) -> None:
    (alone,) = run_in_world(1, calibrated, Layout(choice=choice, mixture_of_depths=mixture_of_depths))
    assert len(alone) == thresholds
    assert all((value > 0).all() for value in alone.values())
    for data in ("ddp", "fsdp2"):
        for got in run_in_world(
            4, calibrated, Layout(2, 2, "pinned", data, choice=choice, mixture_of_depths=mixture_of_depths)
        ):
            torch.testing.assert_close(got, alone, rtol=0, atol=1e-8)
