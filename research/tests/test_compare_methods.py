"""The command that compares methods runs, resumes after an interruption, and repeats no finished run."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from research.experiments import rank_seconds
from research.experiments.study import load_study
from tests.support.tiny import tiny_config, tiny_dataset, write_config

pytestmark = pytest.mark.full  # whole programs that take four minutes of CPU time
REPOSITORY = Path(__file__).parents[2]
CHANGES: dict[str, Any] = {
    "model.moe.groups": {"all": {"num_experts": 4, "top_k": 2, "ffn_dim": 8, "modalities": ["text", "image"]}},
    "parallel.ep": 1,
    "placement.policy": "interleaved",
    "evaluation.every": 1000,
    "evaluation.balance_efficiency": False,
    "evaluation.ablate_experts": False,
    "train.micro_batch": 8,
    "train.steps": 60,
    "checkpoint.every": 60,
    "optimizer.lr": 1e-2,
    "monitor.sinks": [{"kind": "jsonl"}],
}


def compare(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "research.compare_methods", "--base", "base.yaml", "--seeds", "1,2", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(path.read_text()[-2000:] for path in folder.rglob("*.out"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return done.stdout


def test_run_whole_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_dataset(tmp_path / "data", documents=2700)  # enough for the held-out sequences of --rates and --hold
    write_config(tiny_config(tmp_path / "data", tmp_path / "runs", CHANGES), tmp_path / "base.yaml")
    given = ("--budget", "1.5", "--methods", "fixed,remoe", "--ranks", "", "--rates", "1e-2,1e-6")
    given = (*given, "--controls", "--hold")
    first = compare(tmp_path, *given)
    assert first.count("done ") == 4 + 6, "a pilot run of each method with each rate; two seeds of two methods, one control"
    folder = tmp_path / "runs" / "compare" / "budget-1.5"
    _, *records = (json.loads(line) for line in gzip.decompress((folder / "budget-1.5.jsonl.gz").read_bytes()).splitlines())
    loads = {(each["arm"], each["seed"]): each["load"]["by_input"] for each in records}
    for seed in (1, 2):
        for modality in ("text", "image"):
            assert loads["remoe_loads", seed][modality] == pytest.approx(loads["remoe", seed][modality], rel=0.1)
    for each in records:
        assert each["load"]["all"] == pytest.approx(1.5, rel=0.05)
        assert 0.0 < each["accuracy"]["all"] < 1.0
    assert "| `remoe` | positive logits, held by a bias | 0.01 |" in (folder / "table.md").read_text()
    assert (folder / "figure.svg").stat().st_size > 1000
    before = (folder / "budget-1.5.jsonl.gz").read_bytes()
    again = compare(tmp_path, *given)
    assert "train " not in again, "what is finished does not run again"
    assert (folder / "budget-1.5.jsonl.gz").read_bytes() == before

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rank_seconds, "ROUNDS", 1)
    for _ in range(2):  # the second call finds the finished round
        rank_seconds.measure(load_study(folder / "study.yaml"), (2,), folder, lambda: False)
    times = rank_seconds.read_rank_times(folder)
    assert set(times) == {("fixed", 2), ("remoe", 2)}
    assert all(len(each.seconds) == 1 and each.seconds[0] > 0.0 and each.kilobytes > 0.0 for each in times.values())
    assert not list(folder.glob(".ranks-*"))
