"""Runs the command `evaluate` on a small run. Tests its output, the results that it keeps, and tasks that the harness
lacks."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from moe_dist.inference.multiple_choice import MEASURES
from tests.support.invoked import invoke
from tools.evaluate import main

pytestmark = pytest.mark.slow


def test_a_run_is_evaluated_and_earlier_results_stay(own_run: Path, questions: Path, tmp_path: Path) -> None:
    tasks = "nouns-definition,pictures,nouns-category"
    options = ("--tasks", tasks, "--split", "train", "--questions", questions, "--limit", 6)
    assert "pictures-naming" in invoke(main, own_run, *options, code=0).stdout
    first = own_run / "evaluations" / "step_2_1.json"
    record = json.loads(first.read_text())
    assert list(record["tasks"]) == ["nouns-definition", "pictures-naming", "pictures-finding", "nouns-category"]
    for task in record["tasks"].values():
        assert (task["questions"], task["chance"]) == (6, 0.25)
        for measure in MEASURES:
            right = sum(each[measure] == [each["answer"]] for each in task["answers"])
            assert (task[measure]["right"], task[measure]["accuracy"]) == (right, right / 6)
            assert task[measure]["interval"][0] <= right / 6 <= task[measure]["interval"][1]
    again = invoke(main, own_run, *options, "--json")
    assert json.loads(again.stdout) == record == json.loads((own_run / "evaluations" / "step_2_2.json").read_text())
    assert json.loads(first.read_text()) == record
    assert invoke(main, own_run, *options, "--seed", 1, "--out", tmp_path / "mine").exit_code == 0
    assert json.loads((tmp_path / "mine" / "step_2_1.json").read_text())["tasks"] != record["tasks"]


def test_under_rotations_every_one_must_be_right(own_run: Path, questions: Path, tmp_path: Path) -> None:
    options = ("--tasks", "nouns-definition", "--questions", questions, "--limit", 8, "--out", tmp_path, "--json")
    done = invoke(main, own_run, *options, "--rotations", code=0)
    task = json.loads(done.stdout)["tasks"]["nouns-definition"]
    for measure in MEASURES:
        assert all(len(each[measure]) == 4 for each in task["answers"])
        assert task[measure]["right"] == sum(set(each[measure]) == {each["answer"]} for each in task["answers"])


@pytest.mark.parametrize(
    ("name", "guess"), [("lambda_openai", "did you mean lambada_openai?"), ("mmlu_*", "lm_eval ls tasks")]
)
def test_a_task_that_the_harness_lacks_is_refused(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, name: str, guess: str
) -> None:
    """Uses a stub of lm_eval's registry, because reading the real index takes half a minute. `make test-full` reads the
    real index."""
    registry = SimpleNamespace(TaskManager=lambda: SimpleNamespace(all_tasks=["arc_easy", "lambada_openai"]))
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", registry)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    done = invoke(main, own_run, "--harness", name, code=78)
    assert f"--harness {name}" in done.stderr
    assert guess in done.stderr
