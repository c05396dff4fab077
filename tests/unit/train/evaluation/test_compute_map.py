"""A model's compute map equals counts by hand for each token. Making the map changes neither the evaluation nor the
random state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe_dist.data.batch import Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.monitor.compute_map import console_text, draw_map
from moe_dist.monitor.statistics import ComputeMap, EvaluationResult
from moe_dist.train.evaluation.compute_map import mean_by_kind
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.objective.loss import forward
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import BEGIN_IMAGE, FILLER_CODE, GRID, IMAGE_IDS, tiny_config

MAP: dict[str, Any] = {"monitor.compute_map": {"sequences": 6, "pictures": 5, "lines": 7}}


class Case(NamedTuple):
    evaluator: Evaluator
    evaluation: EvaluationResult
    without: EvaluationResult
    random_state: tuple[torch.Tensor, torch.Tensor]
    by_hand: list[tuple[Batch, np.ndarray]]  # batches with the true experts of each token [B, S]

    @property
    def map(self) -> ComputeMap:
        return self.evaluation.compute_map

    def tokens(self) -> Iterator[tuple[int, float]]:
        """Returns id and true experts of every token that is not padding."""
        for batch, experts in self.by_hand:
            for row, column in (~batch.padding_BS).nonzero().tolist():
                yield int(batch.tokens_BS[row, column]), float(experts[row, column])


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with world_of_one():
        yield


def evaluator_of(one: OneRank) -> Evaluator:
    plan, training = one.plan, one.training
    return Evaluator(plan.config, plan.manifest, training.parallel, plan.placement, training.step.group_of_modality)


@pytest.fixture(scope="module")
def case(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    changes = {"evaluation.balance_efficiency": False, "evaluation.ablate_experts": False}
    one = OneRank(tiny_data, tmp_path_factory.mktemp("runs"), **changes, **MAP)
    evaluator = evaluator_of(one)
    before = torch.get_rng_state()
    evaluation = evaluator(0)
    states = before, torch.get_rng_state()
    evaluator.mapper, mapper = None, evaluator.mapper
    without = evaluator(0)
    evaluator.mapper = mapper
    return Case(evaluator, evaluation, without, states, list(by_hand(one)))


@torch.no_grad()
def by_hand(one: OneRank) -> Iterator[tuple[Batch, np.ndarray]]:
    plan, model, groups = one.plan, one.training.parallel.model, one.training.step.group_of_modality
    for source in plan.manifest.sources:
        share: dict[str, int] = {"seq_len": 64, "sequences": 6, "micro_batch": 2, "rank": 0, "world_size": 1}
        for batch in heldout_batches(plan.config.data.path, plan.manifest, source=source, **share):
            _, reports = forward(model.eval(), batch, groups, RoutingRequest(keep_choices=True))
            experts = np.zeros(batch.tokens_BS.numel())
            for report in reports:
                for token, columns in enumerate(report.chosen.column_TK.tolist()):
                    experts[token] += sum(0 <= column < plan.placement.num_experts for column in columns)
            yield batch, (experts / len(reports)).reshape(tuple(batch.tokens_BS.shape))


def test_means_by_kind_of_token_equal_a_count_by_hand(case: Case) -> None:
    kinds: dict[str, list[float]] = {"text": [], "drawn cells": [], "background": []}
    for token, experts in case.tokens():
        image = "background" if token == FILLER_CODE else "drawn cells"
        kinds[image if token >= IMAGE_IDS[0] else "text"].append(experts)
    assert case.map.mean == pytest.approx({kind: np.mean(found) for kind, found in kinds.items()}, rel=1e-12)
    assert case.map.most == 2


def test_a_picture_has_the_experts_and_the_background_of_its_own_cells(case: Case) -> None:
    wanted = []
    for batch, experts in case.by_hand:
        for row, column in (batch.tokens_BS == BEGIN_IMAGE).nonzero().tolist():
            at = slice(column + 1, column + 17)
            if len(batch.tokens_BS[row, at]) == 16:
                wanted.append((experts[row, at].tolist(), (batch.tokens_BS[row, at] == FILLER_CODE).tolist()))
    assert len(case.map.pictures) == 5
    for picture in case.map.pictures:
        assert picture.experts.shape == GRID
        assert (picture.experts.ravel().tolist(), picture.empty.ravel().tolist()) in wanted
        assert picture.pixels is None, "the data have no codebook"


def test_the_map_changes_nothing_else_and_is_the_same_again(case: Case) -> None:
    assert vars(case.evaluation) | {"compute_map": None} == vars(case.without)
    assert torch.equal(*case.random_state)
    again = case.evaluator(0).compute_map
    assert (again.mean, again.lines) == (case.map.mean, case.map.lines)


def test_the_map_of_experts_that_choose_has_up_to_all_experts(tiny_data: Path, tmp_path: Path) -> None:
    """With top_k 1 under expert choice, a token may take three experts or none."""
    group = {"num_experts": 3, "top_k": 1, "ffn_dim": 16}
    changes = {
        "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
        "model.moe.groups": {"all": {**group, "modalities": ["text", "image"]}},
        "loss.balance.schedule": [[0, 0.0]],
        **MAP,
    }
    one = OneRank(tiny_data, tmp_path, **changes)
    for layer in one.training.parallel.model.moe_modules():
        layer.router.gates()[0].threshold.fill_(0.5)  # pyright: ignore[reportCallIssue]
    found = evaluator_of(one)(0).compute_map
    experts = np.concatenate([experts[~batch.padding_BS.numpy()] for batch, experts in by_hand(one)])
    assert found.most == 3
    assert (experts.min(), experts.max()) == (0.0, 3.0)
    shown = {load for picture in found.pictures for load in picture.experts.ravel().tolist()}
    shown |= {load for line in found.lines for _, load in line}
    assert shown <= {*experts.tolist()}
    assert min(shown) == 0.0
    assert max(shown) > group["top_k"]
    assert min(found.mean.values()) < experts.mean() < max(found.mean.values())
    assert draw_map(found, title="").shape[2] == 3
    assert "' ' 0 to '@' 3" in "\n".join(text.plain for text in console_text(found, 80))
    assert tiny_config(tiny_data, tmp_path).monitor.compute_map is None


def test_kinds_name_the_modality_only_where_several_have_background() -> None:
    one, two = np.zeros((2, 2, 2)), np.ones((2, 2, 2))  # summed experts and number of tokens, by modality and filler
    one[:, 0, 0], one[:, 1] = 1, 1
    assert mean_by_kind(one, ("text", "image")) == {"text": 1.0, "drawn cells": 1.0, "background": 1.0}
    kinds = ["drawn cells of a", "background of a", "drawn cells of b", "background of b"]
    assert list(mean_by_kind(two, ("a", "b"))) == kinds
