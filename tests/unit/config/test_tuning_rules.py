"""Before training, router tuning checks its configuration and its folder of samples; errors name field, value, rule and
fix."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_dist.config.load import resolved_yaml, rule_violations
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.formats.tuning_manifest import TuningManifest, load_tuning_manifest
from moe_dist.plan.preflight import check
from moe_dist.plan.tuning_rules import check_tuning_data, model_problems
from tests.support.messages import refused
from tests.support.tiny import IMAGE_IDS, tiny_config
from tests.support.tuning_samples import made_samples

SOUND: dict[str, Any] = {
    "train.only": "routers",
    "run.init_from": "runs/base",
    "router_tuning": {"data": "none", "last_layers": 1},
}
ONE = {"text": {"num_experts": 3, "top_k": 1, "ffn_dim": 16}, "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24}}


def config(changes: dict[str, Any]) -> Config:
    return tiny_config(Path("none"), Path("runs"), {**SOUND, **changes})


def tuned(**changes: Any) -> dict[str, Any]:
    return {"router_tuning": {**SOUND["router_tuning"], **changes}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = config({}).model.model_dump(mode="json")
    out = tmp_path_factory.mktemp("samples") / "made"
    return made_samples(out, ids=(4, IMAGE_IDS[0]), layers=(1,), columns=8, model=model, count=10, right=4)


def data_problems(made: Path, changes: dict[str, Any], **section: Any) -> tuple[list[str], list[str]]:
    """Returns the problems that concern the configuration, and those that concern the files."""
    files: list[str] = []
    found = config({**changes, **tuned(data=str(made), **section)})
    return [relation.problem for relation in check_tuning_data(found, None, files)], files


def test_a_folder_that_fits_passes(made: Path) -> None:
    assert data_problems(made, {}) == ([], [])
    assert data_problems(made, {"model.moe.capacity": {"factor": 1.0}}, neighbours={"k": 3}) == ([], [])


@pytest.mark.parametrize(
    ("changes", "section", "text"),
    [
        ({}, {"neighbours": {"k": 4}}, "it has 4 successful samples, but router_tuning.neighbours needs more than 4"),
        ({}, {"neighbours": {"k": 10}, "filter_by_success": False}, "it has 10 samples, but router_tuning.neighbours"),
        ({}, {"neighbours": {"k": 4}}, "; lower router_tuning.neighbours.k, or prepare more questions"),
        ({}, {"layers": [0]}, "has no routing of the layers [0], only of [1]; prepare it with --layers"),
        ({}, {"embedder": "cd"}, "its embedder is abababababababab... (made up), but router_tuning.embedder=cd"),
        ({"data.seq_len": 8}, {}, "its longest sample has"),
        ({"model.rope_base": 5.0}, {}, "made from a run with model.rope_base=10000.0, here it is 5.0"),
        ({"model.moe.groups": ONE}, {}, "made from a run with model.moe.groups.text.top_k=2, here it is 1"),
    ],
    ids=str,
)
def test_a_folder_of_another_making_is_refused(
    made: Path, changes: dict[str, Any], section: dict[str, Any], text: str
) -> None:
    problems, files = data_problems(made, changes, **section)
    assert any(text in fault for fault in problems), problems
    assert not files


def test_samples_in_the_ids_of_another_tokenizer(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    data = load_manifest(tiny_data).model_copy(update={"tokenizer": "tokenizer.json"})
    files: list[str] = []
    found = config({"data.path": str(tmp_path), **tuned(data=str(made))})
    (fault,) = [relation.problem for relation in check_tuning_data(found, data, files)]
    assert fault.startswith(f"router_tuning.data={str(made)!r}: its samples were written with another tokenizer than that")
    assert "set data.path to the data of the run" in fault
    assert files == []


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problems = [relation.problem for relation in rule_violations(config({**SOUND, **tuned()}))]
    assert problems == ["router_tuning.neighbours: needs the package scikit-learn; install moe_dist[router-tuning], or "
                      "router_tuning.weight=0"]  # fmt: skip
    assert not list(rule_violations(config({**SOUND, **tuned(weight=0.0)})))


def test_cross_entropy_alone_needs_neither_neighbours_nor_their_routing(made: Path) -> None:
    assert data_problems(made, {}, weight=0.0, layers=[0], neighbours={"k": 99}) == ([], [])
    assert data_problems(made, {}, regulariser="l2", neighbours={"k": 99}) == ([], [])


def test_no_successful_sample(tmp_path: Path) -> None:
    model = config({}).model.model_dump(mode="json")
    none = made_samples(tmp_path / "none", ids=(4, 48), layers=(1,), columns=8, model=model, right=0)
    problems, _ = data_problems(none, {})
    assert "no sample has a successful neighbour" in problems[0]
    assert data_problems(none, {}, filter_by_success=False) == ([], [])


def test_preflight_tells_all_of_it(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    changes = {**SOUND, **tuned(data=str(made), neighbours={"k": 9})}
    with refused(ConfigError):
        check(tiny_config(tiny_data, tmp_path, changes))
    (broken / "routing.npy").unlink()
    with refused(DataError, "routing.npy"):
        check(tiny_config(tiny_data, tmp_path, {**SOUND, **tuned(data=str(broken))}))
    with refused(ConfigError, "manifest.json"):
        check(tiny_config(tiny_data, tmp_path, {**SOUND, **tuned(data=str(tmp_path))}))
    fits = tiny_config(tiny_data, tmp_path, {**SOUND, **tuned(data=str(made))})
    assert check(fits).config == fits
    assert "router_tuning:" in resolved_yaml(fits)


def test_only_the_first_fault_of_a_list_is_collected(made: Path) -> None:
    with pytest.raises(ValidationError) as error:
        TuningManifest.model_validate_json(json.dumps(load_tuning_manifest(made).model_dump() | {"layers": [None, None]}))
    assert error.value.error_count() == 1


def test_a_run_with_more_in_its_model_is_another(made: Path) -> None:
    manifest = load_tuning_manifest(made)
    adapted = {**manifest.model, "attention_lora": {"rank": 2, "alpha": 4.0}}
    problems = model_problems(config({}), manifest.model_copy(update={"model": adapted}))
    assert any("model.attention_lora.rank=2, here it is None" in fault for fault in problems), problems


def test_choices_need_a_folder_that_has_them_and_a_question_that_they_answer(made: Path, tmp_path: Path) -> None:
    assert data_problems(made, {}, objective="choices") == ([], [])
    model = config({}).model.model_dump(mode="json")
    options: dict[str, Any] = {"ids": (4, 48), "layers": (1,), "columns": 8, "model": model}
    older = made_samples(tmp_path / "older", choices=False, **options)
    (fault,), files = data_problems(older, {}, objective="choices")
    assert fault == (
        f"router_tuning.data={str(older)!r}: has no choices.npy, the first tokens of the questions' choices, which "
        "router_tuning.objective=choices needs: an older version prepared it; prepare it again, or set "
        "router_tuning.objective=tokens"
    )
    assert data_problems(older, {}) == ([], [])
    alike = made_samples(tmp_path / "alike", told=False, **options)
    (fault,), _ = data_problems(alike, {}, objective="choices")
    assert "objective=choices has nothing to train: in each of the 20 questions a wrong choice begins with" in fault
    assert "take other --tasks, or set router_tuning.objective=tokens" in fault
    assert not files
