"""Whole runs with Megatron-Core's engine are started by the launcher, stopped, and resumed on other ranks and engines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import EXIT_DONE, StoppedError
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.runtime.run_folder import RunFolder
from tests.support.engine_run import config_of, megatron, ranks
from tests.support.tiny import write_config

pytestmark = pytest.mark.megatron
ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {
    "train.steps": 8,
    "checkpoint.every": 4,
    "evaluation.every": 4,
    "evaluation.final_sequences": 4,  # as many as in earlier evaluations
    "monitor.trace": {"every": 3},
    "monitor.sinks": [{"kind": "console", "every": 1}, {"kind": "jsonl"}, {"kind": "tensorboard"}],
}


def started(module: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str], code: int = EXIT_DONE) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output[-3000:]
    return output


def records(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    path = run.path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.full
def test_a_run_is_stopped_and_goes_on_on_other_ranks_and_in_the_other_engine(tiny_data: Path, tmp_path: Path) -> None:
    own = config_of(tiny_data, tmp_path, {**COMMON, "run.name": "own", **ranks(1)})
    config = config_of(tiny_data, tmp_path, {**COMMON, "run.name": "both", **ranks(2, 2), **megatron(tp=2, pp=2)})
    path, run, launcher = write_config(config, tmp_path / "both.yaml"), RunFolder.of(config), "launchers.local"
    process, deadline = started(launcher, path), time.monotonic() + 300
    while not records(run, "step"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    ended(process, StoppedError.exit_code)
    assert "finite" in ended(started("moe_dist", "verify", run.path))
    assert 0 < len(records(run, "step")) < 8

    # Resumes on two ranks instead of four, with context parallelism and a distributed optimizer.
    cut = ("parallel.edp=1", "engine.tp=1", "engine.pp=1", "engine.cp=2", "engine.distributed_optimizer=true")
    ended(started(launcher, path, *cut))
    ended(started(launcher, path, "train.steps=10", "engine={kind: moe_dist}", "parallel.ep=1", "parallel.edp=1"))
    ended(started(launcher, write_config(own, tmp_path / "own.yaml"), "train.steps=10"))
    both, alone = (records(RunFolder.of(each), "step") for each in (config, own))
    assert [each["step"] for each in both] == list(range(1, 11))
    assert both[0]["scalars"].keys() == alone[0]["scalars"].keys()
    for theirs, ours in zip(both, alone, strict=True):
        for key in ("loss/total", "loss/balance", "optim/grad_norm", "moe/experts_per_token/text"):
            assert theirs["scalars"][key] == pytest.approx(ours["scalars"][key], rel=1e-3), key
    evaluations = (records(RunFolder.of(each), "evaluation") for each in (config, own))
    for theirs, ours in zip(*evaluations, strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)
        assert theirs["tokens"] == ours["tokens"]
    traces = [read_trace(RunFolder.of(each).path) for each in (config, own)]
    assert traces[0].steps == traces[1].steps == (1, 4, 7, 10)
    for number in traces[0].steps:
        theirs, ours = (each.step(number) for each in traces)
        orders = [np.lexsort((each.tokens["position"], each.tokens["sequence"])) for each in (theirs, ours)]
        assert (theirs.tokens[orders[0]] == ours.tokens[orders[1]]).all()
        if number == 1:  # in later steps rounding may decide between nearly equal experts
            assert (theirs.ids[orders[0]] == ours.ids[orders[1]]).all()
    assert "events" in " ".join(each.name for each in (run.path / "tensorboard").iterdir())
