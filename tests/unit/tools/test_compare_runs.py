import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.invoked import invoke
from tools import compare_runs
from tools.compare_runs import first_difference


def line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "kind": "step",
        "time": step * 1.5,
        "scalars": {"loss/total": 3.0 / step, "perf/step_seconds": 0.1},
        "losses": {"text": 3.0 / step},
        "arrays": {"choices_LC": [[1, 2], [3, 4]]},
        **changes,
    }


RUN = [line(step) for step in range(1, 6)]


def record(folder: Path, losses: list[float]) -> Path:
    """Writes and returns the folder of a run with these losses."""
    folder.mkdir()
    steps = [line(at, scalars={"loss/total": loss}, losses={"text": loss}) for at, loss in enumerate(losses, start=1)]
    lines = [json.dumps(each) for each in steps]
    (folder / "metrics.jsonl").write_text("".join(f"{each}\n" for each in lines))
    return folder


def test_the_first_difference_is_shown_and_1(tmp_path: Path) -> None:
    a, b = record(tmp_path / "a", [3.0, 2.0, 1.0]), record(tmp_path / "b", [3.0, 2.5, 9.0])
    done = invoke(compare_runs.main, a, b, code=1)
    assert done.stdout.splitlines() == [
        "first difference: step 2, step; the 1 lines before it are equal",
        "  scalars.loss/total: 2.0 and 2.5",
        "  losses.text: 2.0 and 2.5",
    ]
    assert invoke(compare_runs.main, a, b, "--rtol", "0.5").stdout.startswith("first difference: step 3")
    assert "scalars" not in invoke(compare_runs.main, a, b, "--only", "losses").stdout
    assert invoke(compare_runs.main, a, b, "--only", "ledger").exit_code == 65, "no line has such a key"


@pytest.mark.parametrize(
    ("change", "code"), [({"scalars": 5}, 65), ({"scalars": [1]}, 65), ({"scalars": None}, 65), ({"kind": "\x1b[31mX"}, 1)]
)
def test_a_hostile_record_is_refused_or_escaped(tmp_path: Path, change: dict[str, Any], code: int) -> None:
    a, b = record(tmp_path / "a", [3.0, 2.0]), record(tmp_path / "b", [3.0, 2.0])
    (b / "metrics.jsonl").write_text(f"{json.dumps(line(1, **change))}\n" * 2)
    done = invoke(compare_runs.main, b, a)
    assert (done.exit_code, "\x1b" in done.output) == (code, False)


@pytest.mark.parametrize("content", ["", "5\n"], ids=["empty", "no record"])
def test_nothing_to_compare_is_65(tmp_path: Path, content: str) -> None:
    a, b = record(tmp_path / "a", [3.0]), record(tmp_path / "b", [])
    (b / "metrics.jsonl").write_text(content)
    assert invoke(compare_runs.main, a, b).exit_code == 65


def test_no_record_is_78_and_a_damaged_one_65(tmp_path: Path) -> None:
    a = record(tmp_path / "a", [3.0])
    done = invoke(compare_runs.main, a, tmp_path)
    assert (done.exit_code, done.stdout) == (78, "")
    assert f"compare_runs: {tmp_path / 'metrics.jsonl'} is not there" in done.stderr
    (record(tmp_path / "b", []) / "metrics.jsonl").write_text('{"step": 1,\n{"step": 2}\n')
    done = invoke(compare_runs.main, a, tmp_path / "b")
    assert (done.exit_code, done.stdout) == (65, "")
    assert done.stderr.startswith("compare_runs: ")


def test_times_are_no_difference() -> None:
    other = [{**each, "time": 7.0, "scalars": {**each["scalars"], "perf/step_seconds": 9.0}} for each in RUN]
    assert first_difference(RUN, other) == (None, 5)


def test_the_first_step_and_its_keys_are_found() -> None:
    other = copy.deepcopy(RUN)
    other[3]["losses"]["text"] += 1e-9
    other[3]["arrays"]["choices_LC"][1][0] = 5
    other[4]["losses"]["text"] = 0.0
    difference, same = first_difference(RUN, other)
    assert (difference.step, difference.same, same) == (4, 3, 3)
    assert [key for key, _, _ in difference.keys] == ["losses.text", "arrays.choices_LC.1"]
    assert difference.keys[1][1:] == ([3, 4], [5, 4])
    close, _ = first_difference(RUN, other, rtol=1e-6, only=["losses"])
    assert close.step == 5


def test_a_tolerance_holds_for_each_number_of_a_list() -> None:
    other = copy.deepcopy(RUN)
    other[3]["arrays"]["choices_LC"] = [[1, 2 + 1e-9], [3, 4]]
    assert first_difference(RUN, other)[0] is not None
    assert first_difference(RUN, other, rtol=1e-6) == (None, len(RUN))
    other[3]["arrays"]["choices_LC"][0] = [1]
    assert first_difference(RUN, other, rtol=1e-6)[0] is not None, "a list of another length"
    other[3]["arrays"]["choices_LC"][0] = [1, 10**400]
    assert first_difference(RUN, other, rtol=1e-6)[0] is not None, "an integer that is no float"


def test_a_missing_line_is_a_difference_and_a_shorter_run_is_none() -> None:
    difference, _ = first_difference(RUN, [RUN[0], *RUN[2:]])
    assert difference.keys[0] == ("step", 2, 3)
    assert first_difference(RUN, RUN[:2]) == (None, 2)


def test_a_key_that_one_lacks_is_one() -> None:
    difference, _ = first_difference(RUN, [line(1, surplus=None), *RUN[1:]])
    assert difference.keys == (("surplus", None, None),)
