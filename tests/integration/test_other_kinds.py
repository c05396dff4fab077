"""A run uses a router of another installed package: it starts and resumes, and is refused without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.other_package import write_package
from tests.support.tiny import tiny_config, tiny_dataset, write_config

ROOT = Path(__file__).parents[2]
CHANGES = {
    "train.steps": 2,
    "parallel.ep": 1,
    "placement": {"policy": "interleaved"},
    "evaluation.every": 1000,
    "evaluation.balance_efficiency": False,
}


@pytest.mark.full  # two runs and three commands
def test_a_run_is_started_checked_resumed_and_refused_without_the_package(tmp_path: Path) -> None:
    installed, run = write_package(tmp_path / "site-packages"), tmp_path / "runs" / "tiny"
    tiny_dataset(tmp_path / "data")
    path = str(write_config(tiny_config(tmp_path / "data", tmp_path / "runs", CHANGES), tmp_path / "config.yaml"))
    chosen = [path, "model.moe.router={kind: acme_cosine, temperature: 0.5}"]

    def command(*words: str, here: bool = True) -> tuple[int, str]:
        paths = os.pathsep.join([str(installed)] * here + [str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    def steps() -> list[int]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if line["kind"] == "step"]

    code, told = command("launchers.local", *chosen, "model.moe.router.temperature=10")
    assert code == 78
    assert "model.moe.router.temperature: is hot; lower it below 9" in told
    code, told = command("launchers.local", *chosen)
    assert code == 0, told
    assert steps() == [1, 2]
    code, told = command("launchers.local", *chosen, "train.steps=3")
    assert code == 0, told
    assert steps() == [1, 2, 3]
    code, told = command("tools.export_hf", str(run), "--out", str(tmp_path / "exported"))
    assert code == 78
    assert "model.moe.router.kind=acme_cosine: the exported code has no such router" in told
    for words in (("launchers.local", *chosen), ("launchers.local", str(run / "config.yaml"), "train.steps=4")):
        code, told = command(*words, here=False)
        assert code == 78
        assert "model.moe.router.kind='acme_cosine'; must be one of" in told
    assert "this kind was of the package 'acme-routers', which is not installed here" in told
    code, told = command("tools.generate", str(run), "--prompt", "a", here=False)
    assert code == 65
    assert "'acme-routers', which is not installed here" in told
