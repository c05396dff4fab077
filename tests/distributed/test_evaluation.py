"""Held-out losses do not depend on the number of ranks, and an evaluation does not change the training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.collectives import CommStats
from moe_dist.config.load import load_config
from moe_dist.data.batch import Batch
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import ABSENT
from moe_dist.monitor.statistics import ComputeMap
from moe_dist.parallel.mesh import make_mesh
from moe_dist.train.evaluation.balance import EvenRouter, balance_efficiency
from moe_dist.train.evaluation.compute_map import Mapper
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.evaluation.heldout import heldout_losses
from moe_dist.train.objective.loss import AuxSettings
from tests.support.cover import full
from tests.support.layouts import GROUPS, IMAGE, SEQUENCES, TEXT, Layout, TrainingRank, batch_of, build, placement_of
from tests.support.worlds import RankContext

GROUP_OF_MODALITY = torch.tensor([0, 1])


def with_filler(batch: Batch) -> Batch:
    return Batch(**{**vars(batch), "filler_BS": (batch.labels_BS % 3 == 0) & (batch.label_modality_BS == 1)})


def evaluated(rank: RankContext, layout: Layout) -> tuple[dict[str, float], dict[str, int], dict[str, float], list[Any]]:
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
    parallel = build(layout, mesh, CommStats())
    each = SEQUENCES // rank.world_size
    batches = [with_filler(batch_of(0, 0, rank.rank * each, each))]
    options: dict[str, Any] = {
        "modalities": ("text", "image"), "group_of_modality": GROUP_OF_MODALITY, "world": mesh.world,
    }  # fmt: skip
    heldout = heldout_losses(parallel.model, batches, **options)
    experts_off = heldout_losses(parallel.model, batches, **options, experts_off=True).loss
    assert heldout_losses(parallel.model, batches, **options).loss == heldout.loss
    depth = heldout.counts.depth
    assert (depth is None) == (layout.mixture_of_depths is None)
    counts = [heldout.counts.choices_LC, heldout.counts.tokens_LG]
    counts += [] if depth is None else [depth.tokens_PG, depth.taken_PG]
    return dict(heldout.loss), dict(heldout.tokens), dict(experts_off), counts


@pytest.mark.parametrize("layout", [Layout(4, 1, "uneven"), full(Layout(2, 2, "pinned", "fsdp2"))], ids=str)
def test_losses_are_those_of_one_rank(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    loss, tokens, experts_off, counts = run_in_world(1, evaluated, Layout())[0]
    assert set(loss) == {"text", "image", "image_no_filler"}
    batch = with_filler(batch_of(0, 0, 0, SEQUENCES))
    scored = batch.labels_BS >= 0
    assert tokens["text"] == int((scored & (batch.label_modality_BS == 0)).sum())
    assert tokens["image_no_filler"] == int((scored & (batch.label_modality_BS == 1) & ~batch.filler_BS).sum())
    assert all(abs(experts_off[name] - loss[name]) > 1e-3 for name in loss)
    for got, got_tokens, got_ablated, got_counts in run_in_world(layout.world_size, evaluated, layout):
        assert got_tokens == tokens
        for got_count, count in zip(got_counts, counts, strict=True):
            np.testing.assert_array_equal(got_count, count)
        np.testing.assert_allclose([got[name] for name in loss], list(loss.values()), rtol=1e-9)
        np.testing.assert_allclose([got_ablated[name] for name in loss], list(experts_off.values()), rtol=1e-9)


def test_layers_of_depths_compute_what_they_do_on_one_rank(run_in_world: Callable[..., list[Any]]) -> None:
    """In evaluation, the auxiliary router decides for each token alone. Layer 0 skips some tokens, and layer 1 skips
    none."""
    layout = Layout(2, 1, "pinned", mixture_of_depths="rank", depth_causal="auxiliary")
    alone = run_in_world(1, evaluated, Layout(mixture_of_depths="rank", depth_causal="auxiliary"))[0]
    _, tokens_LG, members_LG, taken_LG = alone[3]
    assert 0 < taken_LG.sum() < members_LG.sum()
    np.testing.assert_array_equal(tokens_LG, np.concatenate([taken_LG, members_LG]))
    for outcome in run_in_world(2, evaluated, layout):
        for got, expected in zip(outcome[3], alone[3], strict=True):
            np.testing.assert_array_equal(got, expected)


def train_only_manifest() -> Manifest:
    return Manifest(
        name="no held-out side",
        vocab_size=IMAGE[1],
        modalities={"text": (TEXT,), "image": (IMAGE,)},
        pad_id=0,
        eos_id=1,
        sources={"all": SourceSection(train=SplitSection(path="none", documents=1, tokens=1), licence="CC0-1.0")},
    )


def mapped(rank: RankContext, layout: Layout) -> ComputeMap | None:
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
    parallel, each = build(layout, mesh, CommStats()), SEQUENCES // rank.world_size
    mapper = Mapper(rank.folder, train_only_manifest(), GROUPS, sequences=each, pictures=0, lines=0)
    batches = [with_filler(batch_of(0, 0, rank.rank * each, each))]
    return mapper(parallel.model, batches, group_of_modality=GROUP_OF_MODALITY, mesh=mesh)


def test_a_compute_map_counts_the_tokens_of_all_ranks(run_in_world: Callable[..., list[Any]]) -> None:
    (alone,) = run_in_world(1, mapped, Layout())
    assert alone.mean.keys() == {"text", "drawn cells", "background"}
    for layout in (Layout(2, 1, "pinned"), Layout(2, 2, "interleaved", "fsdp2")):
        shown, *others = run_in_world(layout.world_size, mapped, layout)
        assert shown.mean == pytest.approx(alone.mean, rel=1e-12)
        assert others == [None] * (layout.world_size - 1)


def nothing_held_out(rank: RankContext) -> tuple[dict[str, float], float | None]:
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    parallel = build(Layout(2), mesh, CommStats())
    manifest = train_only_manifest()
    overrides = ["data.seq_len=12", "train.micro_batch=2", "evaluation.sequences=4", "evaluation.final_sequences=4"]
    overrides += [f"data.path={rank.folder}", "monitor.compute_map={sequences: 4, pictures: 1, lines: 1}"]
    config = load_config("configs/adamoe_moma_tiny_cpu.yaml", overrides)
    evaluate = Evaluator(config, manifest, parallel, placement_of("interleaved", 2), GROUP_OF_MODALITY)
    result = evaluate(3, final=True)
    assert result.compute_map is None
    return dict(result.loss), result.balance_efficiency_by_count


def test_data_without_a_held_out_side_evaluates_to_nothing(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, nothing_held_out) == [({}, None)] * 2


def trained(rank: RankContext, layout: Layout, measure: bool) -> tuple[dict[str, np.ndarray], list[float], float | None]:
    """Takes two steps, with or without an evaluation between them."""
    training, losses, timed = TrainingRank(layout), [], None
    before, aux = torch.get_rng_state(), AuxSettings("null_averaged", 0.02, 1e-3)
    for number in range(2):
        result = training.step([batch_of(number, 0, 4 * rank.rank, 4)], lr=1e-2, aux=aux)
        losses += [*result.nll_M.tolist(), result.grad_norm]
        if measure:
            heldout, where = [batch_of(7, 0, 4 * rank.rank, 4)], {"placement": training.placement, "mesh": training.mesh}
            timed = balance_efficiency(training.parallel.model, heldout, group_of_modality=GROUP_OF_MODALITY, **where).timed
    assert torch.equal(before, torch.get_rng_state())
    return training.logical(), losses, timed


@pytest.mark.parametrize("data", [full("ddp"), "fsdp2"])
def test_measuring_balance_leaves_no_trace(run_in_world: Callable[..., list[Any]], data: str) -> None:
    layout = Layout(2, 1, "pinned", data)
    plain = run_in_world(2, trained, layout, False)
    measured = run_in_world(2, trained, layout, True)
    for (weights, losses, _), (weights_m, losses_m, timed) in zip(plain, measured, strict=True):
        assert losses == losses_m
        assert all(np.array_equal(weights[name], weights_m[name]) for name in weights)
        assert timed is not None
        assert timed > 0


def test_even_routing_keeps_the_number_of_pairs_and_spreads_them() -> None:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(6, GROUPS))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    h_TD, group_T = torch.randn(64, 6), torch.randint(-1, 2, (64,))
    real = router(h_TD, group_T).assignments
    even = EvenRouter(router, GROUPS)(h_TD, group_T).assignments
    assert torch.equal(even.expert_N != ABSENT, real.expert_N != ABSENT)
    assert torch.equal(even.weight_N, real.weight_N)
    taken = even.taken()
    pairs = list(zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    for group in GROUPS:
        loads = [int((taken.expert_N == expert).sum()) for expert in group.experts]
        assert max(loads) - min(loads) <= 1
        assert {int(group_T[t]) for t, e in pairs if e in group.experts} == {GROUPS.index(group)}
