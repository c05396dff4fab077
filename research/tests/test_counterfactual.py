"""A counterfactual equals a forward pass with one changed choice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_dist.errors import ConfigError, DataError
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.train.objective.loss import forward
from research.counterfactual import counterfactual
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one

GROUPS = torch.tensor([0, 1])


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with world_of_one():
        yield


def test_a_counterfactual_changes_one_choice(tiny_data: Path, tmp_path: Path) -> None:
    """The reference is a forward pass whose selection scores force the choices."""
    one = OneRank(tiny_data, tmp_path)
    model, batch = one.training.parallel.model, one.run.loader.batches(0)[0]
    with torch.no_grad():
        before, reports = forward(model, batch, GROUPS, RoutingRequest(keep_choices=True), losses=True)
    (token,) = (batch.modality_BS.flatten() == 0).nonzero().flatten()[[7]].tolist()
    chosen = [report.chosen.column_TK.long() for report in reports if report.chosen is not None]
    for layer in (0, 1):
        other = [column for column in (0, 1, 2, 5) if column not in chosen[layer][token]]
        found = counterfactual(model, batch, GROUPS, token=token, layer=layer, choice=other)
        wanted = [columns.clone() for columns in chosen]
        wanted[layer][token] = torch.tensor(other)
        for each, columns in zip(model.moe_modules(), wanted, strict=True):
            each.router._selection_scores = lambda masked_TC, _, columns=columns: (  # pyright: ignore
                torch.full_like(masked_TC, -1.0).scatter(
                    1, columns.clamp_min(0), torch.tensor([[2.0, 1.0]]).expand_as(columns)
                )
            )
        with torch.no_grad():
            after, _ = forward(model, batch, GROUPS, losses=True)
        for each in model.moe_modules():
            del each.router._selection_scores
        assert torch.equal(found, after - before)
        assert found.flatten()[token].abs() > 1e-7
        assert found.flatten()[:token].abs().max() < 1e-5
    with refused(ConfigError, "token=99999"):
        counterfactual(model, batch, GROUPS, token=99999, layer=0, choice=[0, 1])
    with refused(DataError, "counterfactual: "):
        counterfactual(model, batch, GROUPS, token=token, layer=0, choice=[0, 3])
