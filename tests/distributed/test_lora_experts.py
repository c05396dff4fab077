"""Whole runs train adapters on a frozen base: LoRA experts, or LoRA on the attention and experts of a mixture.

A run finds its base by the hash of the base's content. Frozen tensors have no gradients, no moments and no reductions.
test_kinds_on_ranks.py compares N ranks with one rank.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError, DataError
from tests.support.cover import full
from tests.support.whole_run import WholeRun, whole_run
from tests.support.worlds import RankContext

DENSE = {"all": {"num_experts": 1, "top_k": 1, "ffn_dim": 16, "modalities": ["text", "image"]}}
BASE = {
    "run.name": "base",
    "model.moe.groups": DENSE,
    "placement.policy": "interleaved",
    "parallel.ep": 1,
    "loss.balance.schedule": [[0, 0.0]],
}
GROUPS = {
    "text": {"num_experts": 3, "num_null": 1, "top_k": 2, "ffn_dim": 16},
    "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 16},
}


def adapters(root: Path, **changes: Any) -> dict[str, Any]:
    """Returns the configuration changes that train adapters on the base run."""
    return {
        "run.name": "adapted",
        "run.init_from": str(root / "base"),
        "run.init_rules": ["adapt"],
        "run.seed": 3,
        "model.moe.groups": GROUPS,
        "model.moe.experts": {"kind": "lora", "rank": 2, "alpha": 4.0},
        "model.moe.router": {"normalise": "none"},
        "model.attention_lora": {"rank": 2, "alpha": 4.0, "targets": ["q", "v"]},
        "train.only": "adapters",
        "placement.policy": "interleaved",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


Run = Callable[..., list[WholeRun]]


@pytest.fixture(scope="module")
def root(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the runs; it contains a trained base."""
    folder = tmp_path_factory.mktemp("runs")
    run_in_world(1, whole_run, tiny_data, folder, BASE)
    return folder


def is_trained(name: str) -> bool:
    return ".adapters." in name or ".moe.router." in name


@pytest.mark.parametrize(("world_size", "data"), [full(1, "ddp"), (2, "ddp"), full(2, "fsdp2"), full(4, "fsdp2")])
def test_a_run_moves_adapters_and_routers_alone_and_saves_nothing_else(
    run_in_world: Run, tiny_data: Path, root: Path, world_size: int, data: str
) -> None:
    name = f"adapted-{world_size}-{data}"
    layout = {"parallel__ep": world_size, "parallel__data": data, "model__attention_lora__dropout": 0.1}
    changes = adapters(root, run__name=name, **layout)
    runs = run_in_world(world_size, whole_run, tiny_data, root, changes)
    # If a tensor has fewer rows than there are ranks, the last ranks have empty shards and no moments.
    assert set.union(*(run.trained for run in runs)) == {name for name in runs[0].tensors if is_trained(name)}
    for run in runs:
        for name_, before in run.at_start.items():
            assert np.array_equal(before, run.tensors[name_]) != is_trained(name_), name_
        assert not any(step.ledger["payload_bytes"] for step in run.steps)
    checkpoint = root / name / "checkpoints" / "step_4"
    index, state = (json.loads((checkpoint / f"{each}.json").read_text()) for each in ("index", "state"))
    assert index["tensors"]
    assert all(is_trained(each) for each in index["tensors"])
    assert any(each.startswith("optimizer.exp_avg.layers.0.moe.adapters.text.gate_a") for each in index["tensors"])
    base = state["values"]["base"]
    assert base["path"] == str(root / "base" / "checkpoints" / "step_4")
    assert len(base["content"]) == 64


def is_matrix(name: str) -> bool:
    return name.endswith(("_a", "_b"))


CLAMPED = {"model.attention": {"kind": "sinks"}, "model.moe.experts": {"kind": "clamped_ffn", "limit": 0.5}}
SIZES = {"rank": 2, "alpha": 4.0}
# For each mixture: changes of the base run, changes that add adapters, and the condition on names of trained tensors.
MIXTURES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[str], bool]]] = {
    "attention": ({}, {"model.attention_lora": SIZES}, is_trained),
    "experts": ({}, {"model.moe.experts": {"kind": "ffn_lora", **SIZES}}, is_matrix),
    "clamped experts": (
        CLAMPED,
        {"model.moe.experts": {"kind": "clamped_ffn_lora", **SIZES, "swiglu_limit": 0.5}},
        is_matrix,
    ),
}


@pytest.mark.parametrize("kind", [kind if kind == "experts" else full(kind) for kind in MIXTURES])
def test_adapters_of_a_mixture_go_on_on_other_ranks(run_in_world: Run, tiny_data: Path, tmp_path: Path, kind: str) -> None:
    """Two ranks with different experts train adapters and save. One rank resumes the run; the base stays bit-equal."""
    base, adapted, trains = MIXTURES[kind]
    run_in_world(2, whole_run, tiny_data, tmp_path, {**base, "run.name": "base", "train.steps": 1})
    changes = {
        **base, **adapted, "run.name": "adapted", "run.init_from": str(tmp_path / "base"),
        "run.init_rules": ["adapt"], "train.only": "adapters", "parallel.data": "fsdp2",
    }  # fmt: skip
    first = run_in_world(2, whole_run, tiny_data, tmp_path, {**changes, "train.steps": 2})
    alone = {"parallel.ep": 1, "placement.policy": "interleaved", "parallel.data": "ddp"}
    (second,) = run_in_world(1, whole_run, tiny_data, tmp_path, {**changes, **alone})
    assert second.begun.step == 2
    for run in first:
        assert any(step.ledger["payload_bytes"] for step in run.steps)
        assert any(map(trains, run.tensors))
        assert all(map(trains, run.trained)), "no moments for what is frozen"
        for name, value in run.tensors.items():
            assert np.array_equal(run.at_start[name], value) != trains(name), name
            np.testing.assert_array_equal(second.at_start[name], value, err_msg=name)


def refused(rank: RankContext, data: Path, root: Path, changes: dict[str, Any]) -> str:
    try:
        whole_run(rank, data, root, changes)
    except (ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def test_another_base_is_refused_with_both_hashes(run_in_world: Run, tiny_data: Path, root: Path, tmp_path: Path) -> None:
    for each in ("base", "other"):
        run_in_world(1, whole_run, tiny_data, tmp_path, {**BASE, "run.name": each, "run.seed": len(each)})
    changes = adapters(tmp_path, parallel__ep=1, train__steps=2)
    run_in_world(1, whole_run, tiny_data, tmp_path, changes)
    shutil.rmtree(tmp_path / "base")
    changes["train.steps"] = 4
    (told,) = run_in_world(1, refused, tiny_data, tmp_path, changes)
    assert told.startswith("DataError")
    assert "is missing; restore it" in told
    shutil.copytree(tmp_path / "other", tmp_path / "base")
    told, other = run_in_world(2, refused, tiny_data, tmp_path, {**changes, "parallel.ep": 2})
    noted = json.loads((tmp_path / "adapted/checkpoints/step_2/state.json").read_text())["values"]["base"]["content"]
    assert told.startswith("DataError")
    assert f"were trained on a base with {noted}" in told
    assert "its content hash is " in told
    assert "restore that base" in told
    assert other.startswith("DataError"), "all ranks end alike"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model__moe__groups": {**GROUPS, "text": {**GROUPS["text"], "ffn_dim": 24},
                                 "image": {**GROUPS["image"], "ffn_dim": 24}}},
         "layers.0.moe.ffn.gate.weight: torch.float32 (24, 32) in the model, F32 (16, 32) in layers.0.moe.experts"),
        ({"model__num_layers": 1}, "layers.1.attention.k.weight: the model does not use this tensor"),
        ({"model__num_layers": 3}, "layers.2.attention.norm.weight: the base has no such tensor"),
        ({"model__rope_base": 500.0}, "model.rope_base=500.0, the base's is 10000.0"),
        ({"run__init_from": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    run_in_world: Run, tiny_data: Path, root: Path, changes: dict[str, Any], fault: str
) -> None:
    (told,) = run_in_world(1, refused, tiny_data, root, adapters(root, run__name="unfit", parallel__ep=1, **changes))
    assert fault in told
    assert not (root / "unfit" / "checkpoints").exists()


def test_adapters_are_no_base(run_in_world: Run, tiny_data: Path, root: Path) -> None:
    run_in_world(1, whole_run, tiny_data, root, adapters(root, run__name="first", parallel__ep=1, train__steps=2))
    second = adapters(root, run__name="second", parallel__ep=1, run__init_from=str(root / "first"))
    (told,) = run_in_world(1, refused, tiny_data, root, second)
    assert "it holds adapters and not the model under them" in told
