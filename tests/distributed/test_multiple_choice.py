"""Log-likelihoods do not depend on the number of ranks. Two ranks divide the experts and the requests, and the last round
of requests is not full."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.inference.likelihood import Continuation, Likelihood
from moe_dist.inference.loaded_run import find_trained
from moe_dist.parallel.mesh import make_mesh
from tests.support.one_rank import OneRank, world_of_one
from tests.support.worlds import RankContext

# Each request is longer than `batch_tokens`, so there are five batches for two ranks.
ASKED = [Continuation(list(range(8, 8 + size)), [50, 51, 24, 9][: 1 + size % 4]) for size in (3, 5, 8, 12, 14)]


def scored(rank: RankContext, run: Path) -> tuple[list[float], list[bool], int]:
    trained, cpu = find_trained(run), torch.device("cpu")
    mesh = make_mesh(ep=rank.world_size, device=cpu, timeout=600.0)
    model = trained.load(cpu, mesh)
    likelihood = Likelihood(
        model,
        trained.manifest,
        group_of_modality=trained.group_of_modality,
        max_seq_len=64,
        mesh=mesh,
        batch_tokens=1,
    )
    scores = likelihood(ASKED)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return [each.nats for each in scores], [each.greedy for each in scores], experts


def test_scores_are_those_of_one_rank(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path) -> None:
    with world_of_one():
        run = OneRank(tiny_data, tmp_path)
        run.train_and_save()
    ((nats, greedy, experts),) = run_in_world(1, scored, run.folder.parent)
    assert len({round(each, 3) for each in nats}) == len(ASKED)
    found = run_in_world(2, scored, run.folder.parent)
    assert sum(here for _, _, here in found) == experts
    for got, got_greedy, here in found:
        assert got == pytest.approx(nats, rel=1e-6)
        assert got_greedy == greedy
        assert here < experts
