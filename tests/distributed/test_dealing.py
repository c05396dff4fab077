"""If sequences are dealt to ranks by their costs, a step has the same float64 gradient as without dealing, with and without
losses per micro-batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe_dist.data.dealing import Dealing, SequenceCosts
from moe_dist.data.loader import TrainLoader
from moe_dist.formats.manifest import Manifest, load_manifest
from moe_dist.train.objective.loss import AuxSettings
from tests.support.agreement import Arrays, merged
from tests.support.cover import exhaustive, full
from tests.support.layouts import SEQ_LEN, Layout, TrainingRank
from tests.support.worlds import RankContext

COSTS = SequenceCosts(np.arange(SEQ_LEN + 1.0) ** 2, np.array([3.0, 1.0]))
BATCH = 16


class Stepped(NamedTuple):
    """The gradients of one step on a rank, and the numbers of the sequences that each micro-batch of each rank had."""

    gradients: Arrays
    numbers: list[list[int]]


def step_of(rank: RankContext, layout: Layout, data: Path, dealt: bool, terms: bool) -> Stepped:
    """Takes one step on a data folder, with two sequences per micro-batch and rank."""
    training, found = TrainingRank(layout, clip_norm=None), {}
    training.optimizer.register_step_pre_hook(lambda *_: found.update(training.logical(gradient=True)))
    loader = loader_of(data, load_manifest(data), rank, Dealing(COSTS, layout.ep, mix=not terms) if dealt else None)
    aux = AuxSettings(kind="null_averaged", balance=0.02 if terms else 0.0, z=1e-3 if terms else 0.0)
    training.step(loader.batches(BATCH), lr=1e-2, aux=aux)
    return Stepped(found, [list(each) for each in loader.numbers(BATCH)])


def loader_of(data: Path, manifest: Manifest, rank: RankContext, dealing: Dealing | None) -> TrainLoader:
    share = {"global_batch": BATCH, "micro_batch": 2, "rank": rank.rank, "world_size": rank.world_size}
    return TrainLoader(data, manifest, seq_len=SEQ_LEN, weights={}, pack_window=8, seed=3, dealing=dealing, **share)


@pytest.mark.parametrize(
    ("layout", "terms"),
    [
        exhaustive(Layout(1, 2), True),
        full(Layout(1, 2), False),
        (Layout(2, 1, "pinned", "fsdp2"), True),
        full(Layout(2, 1, "pinned", "fsdp2"), False),
    ],
    ids=str,
)
def test_a_dealt_step_has_the_undealt_gradient(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, layout: Layout, terms: bool
) -> None:
    plain, dealt = (run_in_world(2, step_of, layout, tiny_data, each, terms) for each in (False, True))
    moved = [[sorted(numbers) for numbers in rank.numbers] for rank in plain]
    assert moved != [[sorted(numbers) for numbers in rank.numbers] for rank in dealt]
    whole, again = (sorted(n for rank in ranks for each in rank.numbers for n in each) for ranks in (plain, dealt))
    assert whole == again == list(range(BATCH, 2 * BATCH))
    expected, got = (merged([rank.gradients for rank in ranks]) for ranks in (plain, dealt))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert max(np.abs(value).max() for value in expected.values()) > 1e-3
