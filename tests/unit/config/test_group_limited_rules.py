"""Rules of the group-limited router for the rest of a configuration."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.schema import Config
from tests.support.tiny import tiny_config

GROUPS = {
    "text": {"num_experts": 8, "num_null": 2, "top_k": 4, "ffn_dim": 16},
    "image": {"num_experts": 4, "top_k": 2, "ffn_dim": 24},
}


def problems(router: dict[str, Any], **changes: Any) -> list[str]:
    values = {"model.moe.groups": GROUPS, "model.moe.router": {"kind": "group_limited", **router}, **changes}
    config: Config = tiny_config(Path("none"), Path("runs"), values)
    return [violation.problem for violation in config.model.moe.router.violations_in(config)]


@pytest.mark.parametrize("router", [{}, {"n_group": 2, "topk_group": 1}, {"n_group": 2, "topk_group": 2}])
def test_sound_ones_pass(router: dict[str, Any]) -> None:
    assert problems(router) == []


@pytest.mark.parametrize(
    ("router", "fault", "fix"),
    [
        (
            {"n_group": 2, "topk_group": 3},
            "model.moe.router.topk_group=3: there are model.moe.router.n_group=2",
            "lower it",
        ),
        ({"n_group": 3}, "model.moe.router.n_group=3: model.moe.groups.text.num_experts=8", "take a divisor of it up to 4"),
        ({"n_group": 4}, "n_group=4: model.moe.groups.image.num_experts=4 must divide into node groups", "up to 2"),
        (
            {"n_group": 4, "topk_group": 1},
            "model.moe.groups.text.top_k=5: with model.moe.router.topk_group=1 of 4 node groups a token has 4 columns",
            "lower top_k, or raise topk_group",
        ),
    ],
)
def test_each_rule_is_named_with_its_fix(router: dict[str, Any], fault: str, fix: str) -> None:
    found = problems(router, **{"model.moe.groups": {**GROUPS, "text": {**GROUPS["text"], "top_k": 5}}})
    assert any(fault in each and fix in each for each in found), found


def test_auxiliary_routers_are_refused() -> None:
    found = problems({}, **{"train.only": "auxiliary_routers", "run.init_from": "x"})
    assert any("model.moe.router.kind=group_limited has no auxiliary routers" in each for each in found)
