"""Nothing in the folder of a failed run with every sink contains a secret of the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.runtime.run_folder import RunFolder
from tests.support.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[2]
PLANTED = {
    "WANDB_API_KEY": "tok_planted_0123456789abcdef0123456789abcdef",
    "HF_TOKEN": "hf_planted_abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "planted/K7MDENG+bPxRfiCY",
}
SINKS = [
    {"kind": "console", "every": 1},
    {"kind": "jsonl"},
    {"kind": "tensorboard"},
    {"kind": "prometheus"},
    {"kind": "wandb", "project": "x", "mode": "offline"},
]
# A rank fails with a secret in its error message and in local variables, as may happen in the client of a service.
FAILING = """
import os, sys
from moe_dist.runtime.command_line import run_command
from moe_dist.train.loop.trainer import Trainer
from moe_dist.train.__main__ import main
taken = Trainer._step
def step(self):
    if self.progress.step < 2:
        return taken(self)
    token = os.environ["HF_TOKEN"]
    raise ConnectionError(f"401 for https://user:{token}@hub")
Trainer._step = step
run_command(main)
"""


# a whole run with every sink; tests/unit/runtime/test_secrets.py tests the function that hides secrets
@pytest.mark.full
def test_no_byte_of_a_run_has_them(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data,
        tmp_path / "runs",
        {
            "parallel.ep": 1,
            "train.steps": 4,
            "train.global_batch": 2,
            "monitor.sinks": SINKS,
            "placement.policy": "interleaved",
            "evaluation.balance_efficiency": False,
            "checkpoint.asynchronous": False,  # the run fails right after a save, so its files are searched too
        },
    )
    path = write_config(config, tmp_path / "x.yaml")
    environment = {**os.environ, **PLANTED, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FAILING, str(path)]
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert failed.returncode == 1, failed.stderr
    assert b"<HF_TOKEN>@hub" in failed.stderr

    run = RunFolder.of(config)
    latest = run.read_status().attempts[-1]
    assert "<HF_TOKEN>" in latest.reason
    written = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    names = {file.name for file in written}
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "metrics.prom", "rank_0.log", "state.json"} <= names
    assert any("tfevents" in name for name in names)
    assert any(name.endswith(".wandb") for name in names)
    shown = {"standard output": failed.stdout, "standard error": failed.stderr}
    for name, secret in PLANTED.items():
        found = [str(file) for file, content in [*written.items(), *shown.items()] if secret.encode() in content]
        assert not found, f"{name} is in {found}"
