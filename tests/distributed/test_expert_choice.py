"""Expert choice on N ranks: three optimizer steps equal one process that chooses over the same selection scopes.

The one process has one micro-batch per scope. Without a balance loss, micro-batches of a step differ from ranks only by
their scopes. One rank has no token, and some ranks have one modality.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import CHOICE_LOGITS
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.moe.routing.types import GlobalBatchInfo, RoutingCache, RoutingRequest
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.evaluation.calibration import calibrate
from tests.support.cover import full, others_full
from tests.support.layouts import (
    HIDDEN_DIM,
    LAYERS,
    MICRO_BATCHES,
    SEQUENCES,
    STEPS,
    Layout,
    Outcome,
    batch_of,
    build,
    train,
)
from tests.support.outcomes import assert_same_tensors
from tests.support.syncs import host_syncs
from tests.support.worlds import RankContext

LAYOUTS = [
    Layout(4, 1, "uneven", "fsdp2", "block", choice="rank"),
    Layout(2, 2, "interleaved", "ddp", "block", choice="rank", noise=1.0, per_pair=True),
    Layout(4, 2, "pinned", "fsdp2", "experts", choice="rank", per_pair=True),
    Layout(2, 1, "interleaved", "ddp", "block", choice="rank", noise=1.0, overlap=True, chunks=2),
    Layout(4, 1, "uneven", choice="rank", ranks_per_node=2),
    Layout(2, 1, "pinned", "fsdp2", "block", choice="ep_group", noise=1.0),
    Layout(2, 2, "interleaved", "ddp", "block", choice="ep_group", noise=1.0),
    Layout(4, 2, "pinned", "fsdp2", "experts", choice="ep_group"),
    Layout(4, 1, "uneven", "ddp", "block", choice="world", noise=1.0),
    Layout(2, 2, "pinned", "fsdp2", "block", choice="world", noise=1.0),
    Layout(2, 1, "interleaved", "ddp", "block", choice="rank", mixture_of_depths="rank"),
    Layout(2, 2, "pinned", "fsdp2", "experts", choice="rank", mixture_of_depths="rank"),
    # The loss of auxiliary routers is a mean over a micro-batch. It equals one process only with one scope over all ranks.
    Layout(2, 1, "interleaved", "fsdp2", "block", choice="world", choice_causal="auxiliary"),
    Layout(4, 1, "uneven", choice="world", choice_causal="auxiliary"),
    Layout(2, 2, "pinned", "ddp", "experts", choice="world", choice_causal="auxiliary"),
]


def sets_of(layout: Layout) -> int:
    """Returns the number of selection scopes of one micro-batch."""
    return {"rank": layout.world_size, "ep_group": layout.edp, "world": 1}[layout.choice or "world"]


@pytest.fixture(scope="session")
def one_process(
    run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Layout], tuple[Path, Outcome]]:
    """Returns, for a layout, the folder of its initial weights and the oracle over the same scopes. Oracles are cached."""
    folder = tmp_path_factory.mktemp("choice")
    made: dict[Layout, Outcome] = {}

    def of(layout: Layout) -> tuple[Path, Outcome]:
        same = {"choice_causal": layout.choice_causal, "mixture_of_depths": layout.mixture_of_depths, "noise": layout.noise}
        oracle = Layout(choice="rank", parts=sets_of(layout), **same)
        weights = folder / f"{layout.mixture_of_depths}-{layout.choice_causal}"
        if oracle not in made:
            made[oracle] = run_in_world(1, train, oracle, weights)[0]
        return weights, made[oracle]

    return of


@pytest.mark.parametrize("layout", others_full(LAYOUTS, keep=3), ids=str)
def test_ranks_equal_one_process_over_the_same_sets(
    run_in_world: Callable[..., list[Any]], one_process: Callable[[Layout], tuple[Path, Outcome]], layout: Layout
) -> None:
    folder, oracle = one_process(layout)
    outcomes = run_in_world(layout.world_size, train, layout, folder)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, oracle.steps, strict=True):
            for counts in ("choices_LC", "tokens_LG", "above_LE", "unrouted_LG"):
                np.testing.assert_array_equal(
                    getattr(step.counts, counts), getattr(expected.counts, counts), err_msg=counts
                )
            assert step.ledger["pairs"] == expected.ledger["pairs"] == expected.counts.choices_LC.sum()
            np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-9)
            np.testing.assert_allclose(step.grad_norm, expected.grad_norm, rtol=1e-9)
            np.testing.assert_allclose(step.counts.entropy_LG, expected.counts.entropy_LG, rtol=1e-9)
            np.testing.assert_allclose(step.auxiliary, expected.auxiliary, rtol=1e-9)
            crossings = 5 if layout.recompute == "block" else 4
            if layout.choice_causal == "auxiliary":  # their inputs have no gradient, so backward sends nothing
                crossings = 2
            assert step.ledger["payload_bytes"] == crossings * step.ledger["rows_remote"] * HIDDEN_DIM * 8
        assert outcome.events == outcomes[0].events, "the recorded order of collectives differs between ranks"
        for name, buffer in oracle.buffers.items():
            np.testing.assert_allclose(outcome.buffers[name], buffer, rtol=0, atol=1e-9, err_msg=name)
            np.testing.assert_array_equal(outcome.buffers[name], outcomes[0].buffers[name])
    assert_same_tensors(outcomes, oracle)
    # Evaluation uses thresholds. The oracle cuts its last batch differently, which must not change the logits.
    logits = np.concatenate([outcome.logits for outcome in outcomes])
    np.testing.assert_allclose(logits, oracle.logits, rtol=0, atol=1e-9)
    exchanged = LAYERS * STEPS * MICRO_BATCHES if layout.choice != "rank" else 0
    assert outcomes[0].events.count(CHOICE_LOGITS) == exchanged, "once a layer and micro-batch, also under recompute"
    # Known counts need no exchange of counts. The evaluation at the end chooses by thresholds, and needs one.
    planned = LAYERS * (1 if layout.per_pair else 1 + STEPS * MICRO_BATCHES)
    hop = "inter-node " if layout.ranks_per_node else ""
    assert outcomes[0].events.count(f"{hop}counts") == planned
    assert oracle.steps[0].counts.choices_LC.any()
    assert oracle.steps[0].counts.unrouted_LG.any()


@pytest.mark.full  # the layouts above test recompute up to rounding
def test_recompute_changes_no_bit(
    run_in_world: Callable[..., list[Any]], one_process: Callable[[Layout], tuple[Path, Outcome]]
) -> None:
    """A recomputed layer has the choice, noise and weights of its first forward pass."""
    for choice in ("rank", "world"):
        runs = []
        for recompute in ("none", "experts", "block"):
            layout = Layout(2, 1, "interleaved", "ddp", recompute, "float32", choice=choice, noise=1.0)
            runs.append(run_in_world(2, train, layout))
        for run in runs[1:]:
            for outcome, plain in zip(run, runs[0], strict=True):
                assert all(np.array_equal(outcome.gradients[name], value) for name, value in plain.gradients.items())
                assert all(np.array_equal(outcome.parameters[name], value) for name, value in plain.parameters.items())
                assert all(np.array_equal(outcome.buffers[name], value) for name, value in plain.buffers.items())


T, D = 20, 8
GROUPS = (ExpertGroup("text", 4, 0, 1, 8, 0, ("text",)), ExpertGroup("image", 4, 0, 1, 8, 4, ("image",)))
PLACEMENTS = {
    1: ExpertPlacement(GROUPS, (tuple(range(8)),)),
    4: ExpertPlacement(GROUPS, ((0, 4), (1, 5), (2, 6), (3, 7))),
}


def syncs(rank: RankContext, recompute: str) -> tuple[list[str], list[str]]:
    """Returns the reads and named syncs of a layer's forward and backward."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    comm_stats, placement = CommStats(events=[]), PLACEMENTS[rank.world_size]
    wire = AllToAll(mesh.ep, comm_stats)
    ranks = tuple(range(rank.world_size))
    scope = SelectionScope(ranks=(rank.rank,), ep_ranks=ranks)
    context = RouterContext(D, GROUPS, known_counts=True, selection_scope=scope)
    router = ExpertChoiceRouter(context, noise=1.0, causal="threshold")
    local = [len(placement.local_experts(rank.rank, group)) for group in GROUPS]
    layer = MoELayer(
        norm=torch.nn.RMSNorm(D),
        router=router,
        experts=Experts(D, GROUPS, local),
        dispatcher=KnownCountsDispatcher(DispatchContext(placement, wire)),
        recompute=recompute,  # pyright: ignore[reportArgumentType]
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    # The groups of all ranks, from which each rank knows the others' counts. Rank 1 has only padding.
    groups = [torch.randint(-1, 2, (T,), generator=torch.Generator().manual_seed(r)) for r in ranks]
    if rank.world_size > 1:
        groups[1] = torch.full((T,), -1)
    members = tuple(tuple(int((group_T == index).sum()) for index in range(2)) for group_T in groups)
    batch_info = GlobalBatchInfo(3, 0, rank.rank, (T,) * rank.world_size, members)
    x_TD = torch.randn(T, D, requires_grad=True)
    plans: list[Any] = []
    reads: list[str] = []
    plan = layer.dispatcher.plan
    layer.dispatcher.plan = lambda *args, **options: plans.append(plan(*args, **options)) or plans[-1]  # type: ignore
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
    """Ranks with 5, 0, 9 and 2 tokens choose in one scope over all ranks. Returns this choice, and the choice over all
    tokens on one rank."""
    lengths = (5, 0, 9, 2)
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    generator = torch.Generator().manual_seed(5)
    # integers make products exact, so that scores tie
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
        assert cache.choice is not None
        taken.append(cache.choice.taken_TE.tolist())
    assert (comm_stats.events, comm_stats.metadata_bytes) == ([CHOICE_LOGITS], 3 * max(lengths) * 8 * 8)
    return taken[0], taken[1][mine]


def test_ranks_of_different_lengths_choose_alike(run_in_world: Callable[..., list[Any]]) -> None:
    for got, expected in run_in_world(4, uneven):
        assert got == expected


def calibrated(rank: RankContext, layout: Layout) -> dict[str, np.ndarray]:
    """Returns this rank's thresholds after a calibration on its part of two micro-batches."""
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
            for name, value in alone.items():
                np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-8)
