"""Tests properties of a run that sections compute: experts per token, sizes, and which ranks hold an expert. Also tests
the rules of engines."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.engines.megatron import NEEDED, MegatronEngineSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.plan import host
from moe_dist.plan.planner import expected_plan
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.preflight import check, layout_without_data
from tests.support.engine_run import config_of, megatron
from tests.support.messages import refused
from tests.support.tiny import tiny_config

CHOICE: dict[str, Any] = {
    "model.moe.groups": {
        "text": {"num_experts": 4, "top_k": 1, "ffn_dim": 16},
        "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24},
    },
    "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
    "loss.balance.schedule": [[0, 0.0]],
}
LORA: dict[str, Any] = {
    "run.init_from": "runs/base",
    "run.init_rules": ["adapt"],
    "model.moe.groups.image.ffn_dim": 16,
    "model.moe.experts": {"kind": "lora", "rank": 2, "alpha": 4.0},
    "model.moe.router": {"normalise": "none"},
    "placement.policy": "interleaved",
    "train.only": "adapters",
}


def config(changes: dict[str, Any]) -> Config:
    return tiny_config(Path("none"), Path("runs"), deepcopy(changes))


@pytest.mark.parametrize("kind", ["top_p", "relu", "threshold", "predicted_k", "expert_threshold"])
def test_a_token_of_an_adaptive_router_takes_as_many_experts_as_the_target(kind: str) -> None:
    router = {"model.moe.router": {"kind": kind}, "model.moe.groups.text.top_k": 4}
    target = {"model.moe.balance": [{"kind": "active_experts", "target": {"text": 1.5}, "rate": 1.0}]}
    groups = expert_groups(config({**CHOICE, **router, **({} if kind == "expert_threshold" else target)}).model.moe)
    assert groups[0].expected_experts_per_token == (4.0 if kind == "expert_threshold" else 1.5)


def test_sizes_follow_the_share_that_an_expert_takes() -> None:
    for capacity, text, image in ((None, 1.0, 1.0), (0.375, 1.5, 0.75), ({"text": 0.5}, 2.0, 1.0), (1.0, 4.0, 2.0)):
        router = {"kind": "expert_choice", "causal": "threshold", "capacity": capacity}
        groups = expert_groups(config({**CHOICE, "model.moe.router": router}).model.moe)
        assert [group.expected_experts_per_token for group in groups] == pytest.approx([text, image])
    # One rank has the text experts, and the other rank has the image experts. With capacity 1 every token goes to all
    # experts of its group.
    plan = expected_plan(make_placement(config(CHOICE).placement, groups, num_ranks=2, token_mix={}), {}, name="full")
    assert sum(plan.load_R) == pytest.approx(0.5 * 4 * 16 + 0.5 * 2 * 24)
    assert plan.remote_rows_per_token == pytest.approx(0.5)


def test_every_rank_holds_all_lora_experts() -> None:
    changes = {**LORA, "parallel.ep": 4, "model.attention_lora": {"rank": 2, "alpha": 4.0, "targets": ["q"]}}
    assert layout_without_data(config(changes)).placement.slots == ((0, 1, 2, 3, 4),)


def test_every_rule_of_megatron_allows_the_value_that_it_advises(tiny_data: Path) -> None:
    made = config_of(tiny_data, "runs", {"parallel.ep": 2, "parallel.edp": 2, **megatron(tp=2)})
    for key, allowed, _ in NEEDED:
        value: Any = made
        for name in key.split("."):
            value = getattr(value, name)
        assert value in allowed, key


@pytest.mark.megatron
@pytest.mark.parametrize("package", MegatronEngineSection.needs_modules)
def test_a_missing_package_is_told(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(host, "installed", lambda module: module != package)
    golden = package == "megatron"  # the other package is needed only from Python 3.12 on
    with refused(ConfigError, f"engine.kind=megatron: the package {package} is not installed", golden=golden):
        check(config_of(tiny_data, "runs", {"parallel.ep": 2, "parallel.edp": 2, **megatron(tp=2)}))
