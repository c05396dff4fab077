"""The control routers check their table and the rest of a configuration; errors name the field, value, rule and fix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check, layout_without_data
from tests.support.tiny import tiny_config

GROUPS = {"text": {"num_experts": 4, "top_k": 2, "ffn_dim": 16}, "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24}}
SOUND: dict[str, Any] = {
    "model.moe.groups": GROUPS,
    "model.moe.router": {"kind": "scheduled_top_k", "active_experts": {"text": [1.5, 2.0], "image": [1.0, 0.5]}},
}


def active_experts(**by_group: list[float]) -> dict[str, Any]:
    return {"model.moe.router": {"kind": "scheduled_top_k", "active_experts": by_group}}


def test_what_fits_passes(tiny_data: Path, tmp_path: Path) -> None:
    assert check(tiny_config(tiny_data, tmp_path, SOUND)).config.model.moe.router.kind == "scheduled_top_k"
    mixture_of_depths = {"model.mixture_of_depths": {"capacity": 0.5, "causal": "threshold"}}  # in layer 0
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
        ({"parallel.dispatch": {"kind": "known_counts"}}, "with model.moe.router.kind=scheduled_top_k the tokens choose"),
    ],
)
def test_what_does_not_is_refused(tiny_data: Path, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(tiny_config(tiny_data, tmp_path, {**SOUND, **changes}))
    assert fault in str(raised.value)


def checked(data: Path, tmp_path: Path, table: np.ndarray | str | bytes | None, changes: dict[str, Any]) -> None:
    router: dict[str, Any] = {"kind": "top_k_by_id", "table": str(tmp_path / "loads.npy")}
    if isinstance(table, str):
        Path(router["table"]).write_text(table)
    elif isinstance(table, bytes):
        Path(router["table"]).write_bytes(table)
    elif table is not None:
        np.save(router["table"], table)
    check(tiny_config(data, tmp_path, {"model.moe.groups": GROUPS, "model.moe.router": router, **changes}))


def loads(data: Path, tmp_path: Path, value: float) -> np.ndarray:
    model = tiny_config(data, tmp_path, {}).model
    return np.full((len(model.moe_layers), model.vocab_size), value)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (None, "loads.npy: is no NumPy file ([Errno 2] No such file or directory"),
        ("1.5 1.5", "loads.npy: is no NumPy file ("),
        (b"", "loads.npy: is no NumPy file ("),
        (b"PK", "loads.npy: is no NumPy file ("),
        (np.ones((1, 7)), "loads.npy: has float64 [1, 7]; give floats [2, "),
        (np.ones((2, 7), np.int64), "loads.npy: has int64 [2, 7]; give floats [2, "),
    ],
)
def test_a_bad_table_is_refused(
    tiny_data: Path, tmp_path: Path, table: np.ndarray | str | bytes | None, fault: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        checked(tiny_data, tmp_path, table, {})
    assert fault in str(raised.value)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_a_load_out_of_range_is_refused(tiny_data: Path, tmp_path: Path, value: float) -> None:
    table = loads(tiny_data, tmp_path, 0.5)
    table[1, 3] = value
    with pytest.raises(ConfigError, match="has numbers outside 0 to 1, the smallest top_k of model"):
        checked(tiny_data, tmp_path, table, {})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"model.mixture_of_depths": {"capacity": 0.5, "causal": "threshold"}},
            "model.mixture_of_depths: model.moe.router.kind=top_k_by_id needs each token's id",
        ),
        (
            {"engine": {"kind": "megatron"}},
            "engine.kind=megatron: it passes no token ids to layers, as model.moe.router.kind=top_k_by_id needs",
        ),
        (
            {"model.moe.groups": {**GROUPS, "text": {**GROUPS["text"], "num_null": 2}}},
            "model.moe.groups.text.num_null=2: model.moe.router.kind=top_k_by_id needs true experts only",
        ),
    ],
)
def test_what_does_not_fit_a_table_is_refused(tiny_data: Path, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as raised:
        checked(tiny_data, tmp_path, loads(tiny_data, tmp_path, 0.5), changes)
    assert fault in str(raised.value)


def test_a_dry_run_does_not_read_the_table(tiny_data: Path, tmp_path: Path) -> None:
    router = {"kind": "top_k_by_id", "table": str(tmp_path / "elsewhere.npy")}
    assert layout_without_data(tiny_config(tiny_data, tmp_path, {"model.moe.groups": GROUPS, "model.moe.router": router}))
