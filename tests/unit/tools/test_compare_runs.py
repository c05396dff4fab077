import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.invoked import invoke
from tools import compare_runs


def line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "kind": "step", "time": 1.0, "scalars": {"loss/total": loss}, "losses": {"text": loss}}


def record(folder: Path, losses: list[float]) -> Path:
    """Writes and returns the folder of a run with these losses."""
    folder.mkdir()
    lines = [json.dumps(line(step, loss)) for step, loss in enumerate(losses, start=1)]
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
    (b / "metrics.jsonl").write_text(f"{json.dumps(line(1, 3.0) | change)}\n" * 2)
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
