"""A run is shown with the held-out loss of a fixed top-k only if data and configuration of both match."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_dist.config.load import difference, load_config
from moe_dist.config.schema import Config
from moe_dist.formats.manifest import Manifest
from moe_dist.formats.split_files import data_digest
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.plan.preflight import Preflight
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.loop.fixed_top_k import FIGURES, beside_fixed_top_k
from moe_dist.train.loop.session import conclude
from moe_dist.train.loop.trainer import Finished
from tests.support.tiny import tiny_config, tiny_dataset

HELD_OUT, TRUE = {"text": 3.25, "image": 1.5, "image_no_filler": 2.0}, {"text": 1.125, "image": 0.75}
EVALUATION = EvaluationResult(4, HELD_OUT, {}, experts_per_token=TRUE)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Path]:
    """Returns a data set, and the results of a fixed top-1 on it."""
    data = tmp_path_factory.mktemp("data")
    manifest = tiny_dataset(data)
    theirs = tiny_config(data, Path("elsewhere"), {**_groups(0, 1), "run.name": "fixed"})
    other = tiny_config(data, Path("elsewhere"), {**_groups(0, 1), "train.steps": 8})
    figures = {
        "name": "fixed top-1",
        "config": theirs.model_dump(mode="json", exclude_unset=True),
        "data": data_digest(data, manifest),
        "held_out": {"text": 3.0, "image": 1.75},
        "experts_per_token": {"text": 1.0, "image": 1.0},
    }
    path = data / "figures.json"
    path.write_text(json.dumps([{**figures, "config": other.model_dump(mode="json", exclude_unset=True)}, figures]))
    return data, manifest, path


def _groups(num_null: int, top_k: int) -> dict[str, Any]:
    sizes = {f"model.moe.groups.{name}": {"num_experts": n, "ffn_dim": 16} for name, n in (("text", 3), ("image", 2))}
    return {key: {**size, "num_null": num_null, "top_k": top_k} for key, size in sizes.items()}


def _sentence(prepared: tuple[Path, Manifest, Path], changes: dict[str, Any]) -> str:
    data, manifest, path = prepared
    config = tiny_config(data, Path("runs"), {**_groups(3, 2), **changes})
    return beside_fixed_top_k(config, manifest, EVALUATION, figures=path)


@pytest.mark.parametrize(
    "changes",
    [{}, {"placement.policy": "interleaved"}, {"model.moe.router": {"normalise": "true_all"}}, {"checkpoint.every": 4}],
)
def test_a_run_with_the_same_data_steps_and_seed_is_compared(
    prepared: tuple[Path, Manifest, Path], changes: dict[str, Any]
) -> None:
    assert _sentence(prepared, changes) == (
        "held-out loss of this run / of fixed top-1 (same data, steps and seed, no null experts): text 3.250 / 3.000, "
        "image 1.500 / 1.750 nats; true experts a token: text 1.12 / 1.00, image 0.75 / 1.00"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"train.steps": 6}, {"train.global_batch": 16}, {"run.seed": 1}, {"data.seq_len": 48}, {"optimizer.lr": 1e-3},
        {"model.hidden_dim": 64}, {"model.moe.groups.text.ffn_dim": 32}, {"evaluation.final_sequences": 4},
        {"loss": {"z": 0.5}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_figures_of_another_run_are_not_shown(prepared: tuple[Path, Manifest, Path], changes: dict[str, Any]) -> None:
    assert _sentence(prepared, changes) == ""


@pytest.mark.parametrize("present", [True, False])
def test_figures_of_other_data_are_not_shown(prepared: tuple[Path, Manifest, Path], tmp_path: Path, present: bool) -> None:
    _, manifest, path = prepared
    if present:
        tiny_dataset(tmp_path, seed=1)
    config = tiny_config(tmp_path, Path("runs"), _groups(3, 2))
    assert beside_fixed_top_k(config, manifest, EVALUATION, figures=path) == ""


@pytest.mark.parametrize("change", [{"config": {"unknown": 1}}, {"held_out": {"sound": 1.0}}, None])
def test_figures_that_cannot_be_read_end_no_run(
    prepared: tuple[Path, Manifest, Path], tmp_path: Path, change: dict[str, Any] | None
) -> None:
    data, manifest, path = prepared
    broken = tmp_path / "figures.json"  # if `change` is None, the file does not exist
    if change is not None:
        broken.write_text(json.dumps([{**json.loads(path.read_text())[1], **change}]))
    config = tiny_config(data, Path("runs"), _groups(3, 2))
    assert beside_fixed_top_k(config, manifest, EVALUATION, figures=broken) == ""


def test_the_summary_has_the_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    plan = SimpleNamespace(config=tiny_config(tmp_path, tmp_path))
    conclude(Finished(True, EVALUATION, []), folder, cast(Preflight, plan), beside="held-out loss of this run / of another")
    assert "held-out loss of this run / of another\n" in folder.read_summary()


def test_committed_figures_are_those_of_their_command() -> None:
    for known in json.loads(FIGURES.read_text()):
        program, path, *overrides = known["command"].removeprefix("python -m ").split()
        assert program == "launchers.local"
        assert difference(load_config(path, overrides), Config.model_validate_json(json.dumps(known["config"]))) == []
