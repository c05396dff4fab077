"""Runs the whole benchmark on tiny points. All contenders compute equal sums, and a second call completes an interrupted
file. No test asserts a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, rounds: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "research.bench", "--quick", "--rounds", str(rounds), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.exhaustive  # a whole program that takes 60 s of CPU time
def test_it_runs_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = bench("--json", str(path), "--only", "tokens, no nulls", "--only", "skew")
    assert first.returncode == 0, first.stderr
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["tokens, no nulls/64", "skew/95%:4"]
    assert {"ours / megatron", "ours / naive", "dispatch, combine / floor"} <= set(rows["tokens, no nulls/64"]["ratio"])
    sent = rows["skew/95%:4"]["sent"]
    assert sent["floor"]["payload_bytes"] == sent["ours at rank"]["payload_bytes"] == sent["ours"]["payload_bytes"]
    assert sent["ours"]["rows"] <= sent["per pair"]["rows"] == sent["megatron, capacity"]["rows"] < sent["naive"]["rows"]
    assert sent["megatron"]["rows"] == sent["megatron, capacity"]["rows"], "no row for a null choice"
    assert sent["naive"]["rows"] == sent["megatron, remapped"]["rows"]

    second = bench("--json", str(path))
    assert second.returncode == 0, second.stderr
    done = json.loads(path.read_text())["rows"]
    assert list(done)[:2] == list(rows)
    assert done["skew/95%:4"] == rows["skew/95%:4"], "a row was measured again"
    assert {"scaling/tokens", "layer/quick", "layer/quick, null", "step/default model", "workload/W4"} <= set(done)
    assert path.with_suffix(".png").stat().st_size > 0
    shown = bench("--json", str(path), "--markdown")
    assert "### Whole training step" in shown.stdout

    other = bench("--json", str(path), rounds=3)
    assert other.returncode == 78
    assert "rounds=3: the rows of" in other.stderr
    assert "--fresh" in other.stderr
    assert json.loads(path.read_text())["rows"] == done, "rows were lost"
    again = bench("--json", str(path), "--only", "skew", "--fresh")
    assert again.returncode == 0, again.stderr
    after = json.loads(path.read_text())["rows"]
    assert after.pop("skew/95%:4") != done.pop("skew/95%:4")
    assert after == done


def test_more_ranks_than_cores_are_refused(tmp_path: Path) -> None:
    refused = bench("--json", str(tmp_path / "x.json"), "--world", "1000")
    assert refused.returncode == 78
    assert "more ranks than" in refused.stderr


def test_a_sweep_without_its_option_is_refused() -> None:
    refused = bench("tokens")
    assert refused.returncode == 78
    assert "tokens: only --count takes key=value" in refused.stderr
