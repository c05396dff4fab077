"""An experiment from the command line is killed, resumed and measured. A finished experiment is not repeated."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.checkpoint.directory import CheckpointDirectory
from research.experiments.measure import Measurement, Spent
from research.experiments.study import MeasureSection
from tests.support.tiny import tiny_config, tiny_dataset, write_config

pytestmark = pytest.mark.full  # whole programs that take two minutes of CPU time
REPOSITORY = Path(__file__).parents[2]
ARM = {"about": "", "seeds": "decisive"}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "question": "does it go on?",
    "base": "base.yaml",
    "seeds": {"decisive": [1, 2], "other": [1, 2]},
    "pilot": {"seeds": [9], "found": "lr", "arms": ["dropped", "choice"]},
    "measure": {
        "sequences": 8,
        "wire": {"ep": 2},
        "threshold_loads": [1.5],
        "flips": [5.0],
        "curve": {"average": 0.5, "sequences": 4},
    },
    "arms": {
        "base": {**ARM, "set": {"train.steps": 40}, "probes": ["threshold"]},
        "dropped": {
            **ARM,
            "after": "base",
            "carry": True,
            "asks": ["load_tables"],
            "set": {"train.steps": 4, "run.keep_position": True, "model.moe.router.kind": "scheduled_top_k"},
            "measured": {"model.moe.router.active_experts.all": {"arm": "base", "metric": "load.by_layer"}},
        },
        "choice": {
            **ARM,
            "set": {
                "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
                "loss.balance.schedule": [[0, 0.0]],
            },
            "probes": ["flip", "hindsight"],
        },
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a working directory with a study, its base and its data."""
    tiny_dataset(tmp_path / "data")
    group = {"num_experts": 4, "top_k": 2, "ffn_dim": 8, "modalities": ["text", "image"]}
    changes = {
        "model.moe.groups": {"all": group},
        "checkpoint.every": 2,
        "checkpoint.keep": 50,
        "evaluation.every": 1000,
        "evaluation.ablate_experts": False,
        "evaluation.balance_efficiency": False,
        "parallel.ep": 1,
        "parallel.edp": 1,
        "placement.policy": "interleaved",
    }
    write_config(tiny_config(tmp_path / "data", tmp_path / "runs", changes), tmp_path / "base.yaml")
    (tmp_path / "configs" / "reproduce").mkdir(parents=True)
    (tmp_path / "configs" / "reproduce" / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "research.experiments", "tiny", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(folder: Path, *arguments: str, code: int = 0) -> str:
    process = started(folder, *arguments)
    output, _ = process.communicate()
    logs = "".join(path.read_text()[-2000:] for path in folder.rglob("*.out"))
    assert process.returncode == code, f"{output}\n{logs}"
    return output


@pytest.mark.exhaustive
def test_killed_gone_on_with_measured_and_done_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / "runs" / "reproduce" / "tiny-pilot" / "base" / "seed-9"
    killed = started(folder, "--pilot")
    shelf = CheckpointDirectory(run / "checkpoints")
    while killed.poll() is None and not shelf.steps():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    output, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, output
    assert 0 < shelf.steps()[-1] < 40, "killed in the middle"
    assert "base  " in (status := ended(folder, "--pilot", "--status"))
    assert "0 of 3 runs done" in status

    assert "done dropped seed 9" in ended(folder, "--pilot")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == list(range(1, 41)), "each step once"
    attempts = json.loads((run / "status.json").read_text())["attempts"]
    assert len(attempts) >= 2, "the second call went on with the run of the first"

    results = folder / "runs" / "reproduce" / "tiny-pilot" / "results.jsonl.gz"
    header, *records = (json.loads(line) for line in gzip.decompress(results.read_bytes()).splitlines())
    assert header["study"] == "tiny"
    assert header["rules"] is None
    base, dropped, choice = sorted(records, key=lambda record: list(STUDY["arms"]).index(record["arm"]))
    assert base["load"]["all"] == 2.0
    assert base["wire"]["rows_remote"] <= base["wire"]["rows_per_pair"] <= base["wire"]["rows_topk"] * 1.5
    assert [point["step"] for point in base["curve"]] == list(range(2, 41, 2))
    assert [point["load"] for point in base["probes"]["threshold"]] == [pytest.approx(1.5, abs=0.05)]
    assert choice["probes"]["flip"][0]["load"] == pytest.approx(choice["load"]["all"], abs=0.1), "of scored tokens"
    assert dropped["flops"] > base["flops"], "what it began with counts"
    assert dropped["curve"][0]["tokens"] > base["tokens"]
    assert "idle" not in base["training"], "each token takes its experts"
    assert choice["training"] == choice["curve"][-1]["training"]
    assert 0 <= choice["training"]["idle"] < 1
    assert min(choice["training"][name] for name in ("text", "image")) <= choice["training"]["all"]
    assert choice["load"]["all"] == pytest.approx(2.0, abs=0.2), "thresholds are those of the mean of weights"
    assert choice["probes"]["hindsight"][0]["load"] == pytest.approx(2.0, abs=0.1)
    assert len(list((run / "checkpoints").glob("step_*"))) == 1, "the curve's checkpoints are gone"

    assert dropped["load_tables"].keys() == {"by_id_folder", "by_modality_folder"}
    monkeypatch.chdir(folder)
    measurement = Measurement(run.parent.parent / "dropped" / "seed-9", MeasureSection(), Spent())
    assert measurement._first_position() == 40 * 8, "behind the sequences of the base"

    before = results.read_bytes()
    assert "train" not in ended(folder, "--pilot")
    assert results.read_bytes() == before


def test_runs_that_count_ask_for_committed_rules(folder: Path) -> None:
    assert "must be committed before runs that count" in ended(folder, code=78)
    assert not (folder / "runs" / "reproduce" / "tiny").exists()
    assert "unknown" not in ended(folder, "--status")
    assert "--only nobody: tiny has the arms base, choice, dropped" in ended(folder, "--only", "nobody", code=78)
