"""A module can set a constant initial value for a parameter. The random initialisation must not overwrite this value."""

from pathlib import Path

import pytest
import torch

from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.parameter_names import named_parameters
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model
from tests.support.tiny import tiny_config


def test_a_module_sets_a_constant_start(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TopKRouter.__init__

    def with_temperature(self: TopKRouter, *arguments: object, **options: object) -> None:
        made(self, *arguments, **options)  # pyright: ignore[reportArgumentType]
        self.temperature = torch.nn.Parameter(torch.zeros(1))
        self.initial_values = {"temperature": 0.5}

    monkeypatch.setattr(TopKRouter, "__init__", with_temperature)
    config = tiny_config(tiny_data, tmp_path, {})
    groups = expert_groups(config.model.moe)
    placement = ExpertPlacement(groups, (tuple(expert for group in groups for expert in group.experts),))
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=0, ep_group=None)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=0, std=0.02)
    values = {each.name: each.parameter for each in named_parameters(model)}
    assert [values[f"layers.{layer}.moe.router.temperature"].item() for layer in (0, 1)] == [0.5, 0.5]
    assert values["layers.0.moe.router.text.true"].std() > 0.0
