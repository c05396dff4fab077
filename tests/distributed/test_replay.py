"""A replayed step takes the recorded choices, and has the recorded step's loss and gradients, bit for bit.

The recorded step chooses by reversed scores. Without the record, the replayed step's routers would choose other experts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.data.order import micro_batches
from moe_dist.moe.replayed_routers import Replay
from moe_dist.moe.routing.types import LayerReport
from moe_dist.monitor.trace.format import MANIFEST, Manifest
from moe_dist.monitor.trace.reader import TracedStep, read_trace
from moe_dist.monitor.trace.writer import TraceWriter
from moe_dist.train.evaluation.replay_step import replay_step
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.tracing import StepTracer, StepWatcher
from tests.support.agreement import reversed_scores
from tests.support.cover import full, others_full
from tests.support.layouts import (
    GROUPS,
    HIDDEN_DIM,
    LAYERS,
    MICRO_BATCHES,
    SEQUENCES,
    Layout,
    TrainingRank,
    batch_of,
    placement_for,
)
from tests.support.worlds import RankContext


class Choices(StepWatcher):
    """Keeps the choices [T, L, K], their weights, and the group of each token."""

    own_tokens = False

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.group: list[Tensor] = []

    def due(self, number: int) -> bool:
        return True

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        chosen = [report.chosen for report in reports if report.chosen is not None]
        self.ids.append(torch.stack([each.column_TK for each in chosen], 1))
        self.weights.append(torch.stack([each.weight_TK for each in chosen], 1))
        self.group.append(torch.where(batch.padding_BS, -1, batch.modality_BS).flatten())


class Step(NamedTuple):
    result: StepResult
    gradients: dict[str, np.ndarray]
    ids: np.ndarray
    weights: np.ndarray
    group: np.ndarray


def take_step(
    layout: Layout,
    batches: list[Batch],
    *,
    backwards: bool = False,
    replay: Callable[..., Any] | None = None,
    watchers: Sequence[StepWatcher] = (),
) -> Step:
    """Takes one step of a new model. `replay` makes the step's context from the model."""
    training, choices = TrainingRank(layout, clip_norm=None), Choices()
    model = training.parallel.model
    for layer in model.moe_modules() if backwards else ():
        layer.router._selection_scores = reversed_scores  # pyright: ignore[reportArgumentType]
    gradients: dict[str, np.ndarray] = {}
    training.optimizer.register_step_pre_hook(lambda *_: gradients.update(training.logical(gradient=True)))
    aux, watching = AuxSettings("null_averaged", 0.02, 1e-3), list[Any]([choices, *watchers])
    with nullcontext() if replay is None else replay(model):
        result = training.step(batches, lr=1e-2, aux=aux, watchers=watching)
    arrays = (torch.cat(each).numpy() for each in (choices.ids, choices.weights, choices.group))
    return Step(result, gradients, *arrays)


def batches_of(rank: int, world_size: int) -> list[Batch]:
    each = SEQUENCES // world_size
    return [batch_of(0, micro, rank * each, each) for micro in range(MICRO_BATCHES)]


def recorded_replayed_plain(rank: RankContext, layout: Layout) -> list[Step]:
    take = partial(take_step, layout, batches_of(rank.rank, rank.world_size))
    recorded = take(backwards=True)
    return [recorded, take(replay=lambda model: Replay(model, recorded.ids, recorded.group)), take()]


LAYOUTS = [
    Layout(ep, edp, "interleaved", data, recompute)
    for (ep, edp), data, recompute in product(
        ((1, 1), (1, 2), (2, 1), (4, 1), (2, 2)), ("ddp", "fsdp2"), ("none", "experts", "block")
    )
]
OTHERS = [
    full(Layout(1, 1, data="fsdp2", recompute="block", free=True, precision="float32")),
    Layout(4, 1, "uneven", "ddp", "experts", free=True),
    Layout(2, 1, "pinned", "ddp", "block", capacity=1.0),
    full(Layout(2, 1, recompute="block", limited=True, overlap=True, chunks=2)),
    full(Layout(1, 2, recompute="block", lora="probability")),
    full(Layout(2, 2, "pinned", "fsdp2", "block", ffn_lora="each")),
    full(Layout(4, 1, "uneven", "ddp", "block", ranks_per_node=2)),
]


@pytest.mark.parametrize("layout", [*others_full(LAYOUTS, keep=0), *OTHERS], ids=str)
def test_a_replayed_step_has_the_bits_of_the_recorded_one(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    for recorded, replayed, plain in run_in_world(layout.world_size, recorded_replayed_plain, layout):
        assert replayed.gradients.keys() == recorded.gradients.keys()
        for name, gradient in recorded.gradients.items():
            assert np.array_equal(replayed.gradients[name], gradient), name
        one, other = (each.result for each in (recorded, replayed))
        for field in ("nll_M", "balance", "z", "grad_norm", "ledger"):
            assert np.array_equal(getattr(one, field), getattr(other, field)), field
        for mine, theirs in zip(one.counts, other.counts, strict=True):
            assert np.array_equal(mine, theirs)
        assert np.array_equal(replayed.ids, recorded.ids)
        assert one.counts.dropped_LE.any() == (layout.capacity is not None)
        assert not np.array_equal(plain.result.nll_M, one.nll_M)
        if len(recorded.ids[recorded.group >= 0]):
            assert not np.array_equal(plain.ids, recorded.ids)
        losing = (replayed.ids >= 0) & (replayed.ids < placement_for(layout).num_experts) & ~_among(plain.ids, replayed.ids)
        assert (replayed.weights[losing] > 0).all()


def _among(ids_TLK: np.ndarray, wanted_TLK: np.ndarray) -> np.ndarray:
    """Returns which of a token's wanted choices are among its choices."""
    return (wanted_TLK[..., None] == ids_TLK[..., None, :]).any(-1)


def sequences_of(rank: int, world_size: int) -> list[range]:
    """Returns the sequence numbers of the batches of `batches_of`."""
    share = {"micro_batch": SEQUENCES // world_size, "rank": rank, "world_size": world_size}
    return micro_batches(0, global_batch=MICRO_BATCHES * SEQUENCES, **share)


def traced_by_one(rank: RankContext, folder: Path) -> Step:
    """Takes the recorded step on one rank, and writes its trace."""
    (folder / "one").mkdir()
    placement = placement_for(Layout())
    fields = {"layers": tuple(range(LAYERS)), "choices": 3, "weights": False, "modalities": ("text", "image")}
    manifest = Manifest(1, 0, 1, groups=GROUPS, rank_of_expert=placement.rank_of_expert, **fields)  # pyright: ignore
    (folder / "one" / MANIFEST).write_text(manifest.to_json())
    writer = TraceWriter(folder / "one", 0, weights=False)
    tracer = StepTracer(writer, every=1, tokens=None, weights=False, sequences=lambda _: sequences_of(0, 1))
    try:
        return take_step(Layout(), batches_of(0, 1), backwards=True, watchers=[tracer])
    finally:
        writer.close()


def replayed_from(rank: RankContext, layout: Layout, folder: Path) -> Step:
    batches, sequences = batches_of(rank.rank, rank.world_size), sequences_of(rank.rank, rank.world_size)
    traced, groups = read_trace(folder).step(1), torch.tensor([0, 1])
    make = partial(
        replay_step, traced=traced, batches=batches, sequences=sequences, group_of_modality=groups, source="trace"
    )
    return take_step(layout, batches, replay=make)


def rows_of(traced: TracedStep, layout: Layout) -> int:
    """Counts, in a loop, the distinct (token, other rank) pairs of all ranks."""
    rank_of_expert, rows = placement_for(layout).rank_of_expert, 0
    for sequence, ids_LK in zip(traced.tokens["sequence"], traced.ids, strict=True):
        own = sequence % SEQUENCES // (SEQUENCES // layout.world_size) % layout.ep
        for ids in ids_LK:
            rows += len({rank_of_expert[i] for i in ids if 0 <= i < len(rank_of_expert)} - {own})
    return rows


@pytest.fixture(scope="session")
def by_one(run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Step]:
    folder = tmp_path_factory.mktemp("trace")
    return folder, run_in_world(1, traced_by_one, folder)[0]


@pytest.mark.parametrize(
    "layout",
    [
        full(Layout(2, 1, "pinned")),
        Layout(4, 1, "uneven", "fsdp2", "block"),
        full(Layout(2, 2, "interleaved", "fsdp2")),
        full(Layout(4, 1, "pinned", "ddp", "experts")),
    ],
    ids=str,
)
def test_another_layout_sends_the_rows_of_the_record(
    run_in_world: Callable[..., list[Any]], by_one: tuple[Path, Step], layout: Layout
) -> None:
    """Several ranks, whose placements differ from the placement of the trace, replay the trace of one rank."""
    folder, recorded = by_one
    traced = read_trace(folder).step(1)
    for outcome in run_in_world(layout.world_size, replayed_from, layout, folder):
        ledger = outcome.result.ledger
        assert ledger["rows_remote"] == rows_of(traced, layout) > 0
        crossings = 5 if layout.recompute == "block" else 4
        assert ledger["payload_bytes"] == crossings * ledger["rows_remote"] * HIDDEN_DIM * 8
        assert np.array_equal(outcome.result.counts.choices_LC, traced.choices())
        for field in ("nll_M", "balance", "z", "grad_norm"):
            np.testing.assert_allclose(getattr(outcome.result, field), getattr(recorded.result, field), rtol=1e-9)
