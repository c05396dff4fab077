"""Rules of a fixed number of experts for the rest of a configuration: errors name field, value, rule and fix."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check
from tests.support.tiny import tiny_config

GROUPS = {
    "text": {"num_experts": 4, "top_k": 2, "ffn_dim": 16},
    "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24},
}
SOUND: dict[str, Any] = {
    "model.moe.groups": GROUPS,
    "model.moe.router": {"kind": "scheduled_top_k", "active_experts": {"text": [1.5, 2.0], "image": [1.0, 0.5]}},
}


def active_experts(**by_group: list[float]) -> dict[str, Any]:
    return {"model.moe.router": {"kind": "scheduled_top_k", "active_experts": by_group}}


def test_what_fits_passes(tiny_data: Path, tmp_path: Path) -> None:
    assert check(tiny_config(tiny_data, tmp_path, SOUND)).config.model.moe.router.kind == "scheduled_top_k"
    mixture_of_depths = {"model.mixture_of_depths": {"capacity": 0.5, "causal": "threshold"}}  # of layer 0
    check(
        tiny_config(
            tiny_data, tmp_path, {**SOUND, **active_experts(text=[2.0, 1.5], image=[1.0, 0.5]), **mixture_of_depths}
        )
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (active_experts(text=[1.0, 1.0]), "active_experts names text; model.moe.groups are text, image: name each group"),
        (
            active_experts(text=[1.0], image=[1.0, 1.0]),
            "active_experts.text has 1 numbers for 2 MoE layers: give one number for each layer",
        ),
        (
            active_experts(text=[1.0, 2.5], image=[1.0, 1.0]),
            "active_experts.text has 2.5, above model.moe.groups.text.top_k=2: lower it",
        ),
        (
            {"model.moe.groups": {**GROUPS, "text": {**GROUPS["text"], "num_null": 2}}},
            "model.moe.groups.text.num_null=2: model.moe.router.kind=scheduled_top_k needs true experts only",
        ),
        (
            {"model.mixture_of_depths": {"capacity": 0.5, "causal": "threshold"}},
            "active_experts.text=[1.5, 2.0] with model.mixture_of_depths: a draw per token is impossible in the layers "
            "[0], which compute some",
        ),
        ({"train.only": "auxiliary_routers"}, "model.moe.router.kind=scheduled_top_k has no auxiliary routers"),
        (
            {"parallel.dispatch": {"kind": "known_counts"}},
            "with model.moe.router.kind=scheduled_top_k the tokens choose",
        ),
    ],
)
def test_what_does_not_is_refused(tiny_data: Path, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(tiny_config(tiny_data, tmp_path, {**SOUND, **changes}))
    assert fault in str(raised.value)
