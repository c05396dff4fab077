"""After `hold_loads` the tokens of each controlled group take the target, whatever the router; nothing else changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.moe.routing import RoutingRequest
from moe_dist.train.loss import forward
from tests.support.one_rank import OneRank, world_of_one
from tools.experiments.held_loads import hold_loads

EXPERTS = 4
ROUTERS: dict[str, dict[str, Any]] = {
    "relu": {},
    "threshold": {},
    "top_p": {},
    "predicted_k": {},
    "top_k": {"normalise": "none", "selection_bias": True},
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with world_of_one():
        yield


def made(data: Path, root: Path, router: str, target: dict[str, float]) -> tuple[OneRank, list[Batch]]:
    null = 4 if router == "top_k" else 0
    group = {"num_experts": EXPERTS, "num_null": null, "top_k": EXPERTS, "ffn_dim": 8}
    names = {"text": ["text"], "image": ["image"]}
    balance = {"kind": "active_experts", "target": target, "rate": 1.0}
    one = OneRank(
        data,
        root,
        **{
            "model.moe.groups": {name: {**group, "modalities": each} for name, each in names.items()},
            "model.moe.router": {"kind": router, **ROUTERS[router]},
            "model.moe.balance": [balance],
            "placement.policy": "interleaved",
            "loss.balance.kind": "vanilla",
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
    """Counts by hand, in each layer, the choices of each group's tokens that have a label."""
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


@pytest.mark.parametrize("router", ROUTERS)
def test_each_layer_and_group_takes_its_target(tiny_data: Path, tmp_path: Path, router: str) -> None:
    target = {"text": 1.3, "image": 2.2}
    one, batches = made(tiny_data, tmp_path, router, target)
    model, groups = one.training.parallel.model.eval(), one.training.step.group_of_modality
    assert any(abs(load - target[name]) > 0.1 for name, found in mean_loads(one, batches).items() for load in found)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_loads(model, batches, target, groups)
    for name, found in mean_loads(one, batches).items():
        assert found == pytest.approx([target[name]] * len(found), abs=0.02), "tokens are discrete"
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            moved = (tensor - before[name])[:EXPERTS]
            torch.testing.assert_close(moved, moved[:1].expand(EXPERTS))
            assert torch.equal(tensor[EXPERTS:], before[name][EXPERTS:]), "null experts keep theirs"
        else:
            assert torch.equal(tensor, before[name]), name


def test_groups_without_target_or_token_stay(tiny_data: Path, tmp_path: Path) -> None:
    one, batches = made(tiny_data, tmp_path, "relu", {"text": 1.3})
    model, groups = one.training.parallel.model.eval(), one.training.step.group_of_modality
    image = mean_loads(one, batches)["image"]
    hold_loads(model, batches, {"text": 1.3}, groups)
    after = mean_loads(one, batches)
    assert after["text"] == pytest.approx([1.3] * len(image), abs=0.02)
    assert after["image"][0] == image[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prose = [batch for batch in batches if not bool((batch.modality_BS == 1).any())]
    assert prose
    hold_loads(model, prose, {"image": 2.0}, groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
