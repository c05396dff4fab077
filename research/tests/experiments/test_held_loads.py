"""For any router, `hold_loads` sets each layer's and group's experts per token to the budget, and changes nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.train.objective.loss import forward
from research.experiments.held_loads import hold_loads
from tests.support.one_rank import OneRank, world_of_one

EXPERTS, BUDGET = 4, 1.3
Made = tuple[OneRank, list[Batch]]
ROUTERS: dict[str, dict[str, Any]] = {
    "relu": {"kind": "relu"},
    "threshold": {"kind": "threshold"},
    "top_p": {"kind": "top_p"},
    "predicted_k": {"kind": "predicted_k"},
    "top_k with nulls": {"kind": "top_k"},
    "top_k with biases": {"kind": "top_k", "normalise": "none", "selection_bias": True},
    "expert_choice": {"kind": "expert_choice", "capacity": 0.5, "causal": "threshold"},
    "expert_threshold": {"kind": "expert_threshold", "capacity": 0.5, "warmup_steps": 1, "causal": "threshold"},
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with world_of_one():
        yield


def made(data: Path, root: Path, router: dict[str, Any], *, num_null: int = 0, top_k: int = EXPERTS) -> Made:
    group = {"num_experts": EXPERTS, "num_null": num_null, "top_k": top_k, "ffn_dim": 8}
    one = OneRank(
        data,
        root,
        **{
            "model.moe.groups": {name: {**group, "modalities": [name]} for name in ("text", "image")},
            "model.moe.router": router,
            "placement.policy": "interleaved",
            "loss.balance": {"kind": "vanilla", "schedule": [[0, 0.0]]},
        },
    )
    batches = [
        batch
        for source in one.plan.manifest.sources
        for batch in heldout_batches(
            one.plan.config.data.path,
            one.plan.manifest,
            source=source,
            seq_len=64,
            sequences=6,
            micro_batch=2,
            rank=0,
            world_size=1,
        )
    ]
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in one.training.parallel.model.moe_modules():
            for parameter in layer.router.parameters():
                parameter.normal_(0.0, 0.3)
    return one, batches


@torch.no_grad()
def mean_loads(one: OneRank, batches: list[Batch]) -> dict[str, list[float]]:
    """Counts in a loop, for each layer, the choices of those tokens of each group that have a label."""
    model, groups = one.training.parallel.model.eval(), one.training.step.group_of_modality
    sums: dict[tuple[str, int], list[int]] = {}
    for batch in batches:
        _, reports = forward(model, batch, groups, RoutingRequest(keep_choices=True))
        group_T = groups[batch.modality_BS.flatten()]
        for place, report in enumerate(reports):
            assert report.chosen is not None
            for token, columns in enumerate(report.chosen.column_TK.tolist()):
                if bool(batch.labels_BS.flatten()[token] != IGNORED):
                    name = one.plan.placement.groups[int(group_T[token])].name
                    found = sums.setdefault((name, place), [0, 0])
                    found[0] += sum(0 <= column < one.plan.placement.num_experts for column in columns)
                    found[1] += 1
    layers = range(len(list(model.moe_modules())))
    return {name: [sums[name, place][0] / sums[name, place][1] for place in layers] for name in ("text", "image")}


@pytest.mark.parametrize("name", ROUTERS)
def test_each_layer_and_group_takes_the_budget(tiny_data: Path, tmp_path: Path, name: str) -> None:
    one, batches = made(tiny_data, tmp_path, ROUTERS[name], num_null=EXPERTS if name.startswith("top_k") else 0)
    model, groups = one.training.parallel.model.eval(), one.training.step.group_of_modality
    assert any(abs(load - BUDGET) > 0.1 for found in mean_loads(one, batches).values() for load in found)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_loads(model, batches, BUDGET, groups)
    for found in mean_loads(one, batches).values():
        assert found == pytest.approx([BUDGET] * len(found), abs=0.02), "tokens are discrete"
    moved = 0
    for key, tensor in model.state_dict().items():
        if key.endswith((".bias", ".threshold")):
            change = tensor - before.get(key, torch.zeros_like(tensor))
            torch.testing.assert_close(change[:EXPERTS], change[:1].expand(EXPERTS))
            assert not change[EXPERTS:].any(), "null experts keep their biases"
            moved += bool(change.any())
        else:
            assert torch.equal(tensor, before[key]), key
    assert moved == 4, "two layers, two groups"


def test_a_given_number_of_experts_stays(tiny_data: Path, tmp_path: Path) -> None:
    one, batches = made(tiny_data, tmp_path, {"kind": "top_k"}, top_k=2)
    model, groups = one.training.parallel.model.eval(), one.training.step.group_of_modality
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_loads(model, batches, BUDGET, groups)
    assert mean_loads(one, batches) == {"text": [2.0, 2.0], "image": [2.0, 2.0]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_group_without_token_stays(tiny_data: Path, tmp_path: Path) -> None:
    one, batches = made(tiny_data, tmp_path, ROUTERS["relu"])
    model, groups = one.training.parallel.model.eval(), one.training.step.group_of_modality
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prose = [batch for batch in batches if not bool((batch.modality_BS == 1).any())]
    assert prose
    hold_loads(model, prose, BUDGET, groups)
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in before if name.endswith("text.bias"))
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before if name.endswith("image.bias"))
    assert any(name.endswith("image.bias") for name in before)
