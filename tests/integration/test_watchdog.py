"""If one rank is suspended, the watchdog's report names this rank, and the layer in which the other ranks wait. If all
ranks are suspended, the run continues."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers.local import launch
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.watchdog import read_reports, report_folder
from tests.support import slowed
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config

SECONDS = 20.0  # longer than the rendezvous takes on a busy machine
SETTINGS = {
    "evaluation.every": 1000,
    "checkpoint.every": 1000,
    "parallel.watchdog_seconds": SECONDS,
    "monitor.sinks": [{"kind": "jsonl"}],
}


@pytest.mark.full  # starts a whole run, and waits 20 s for the watchdog
def test_the_report_names_rank_and_layer(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fault(rank=1, step=2, phase="before_layer_1", kind="freeze").items():
        monkeypatch.setenv(name, value)
    config = tiny_config(tiny_data, tmp_path, SETTINGS)
    assert launch(write_config(config, tmp_path / "run.yaml"), program=PROGRAM) == 1
    run = RunFolder.of(config)
    status = run.read_status().latest
    assert status is not None
    assert status.verdict == 1
    assert "collective 'counts' of layers.1 did not finish in 20 s at step 1; rank 1 did not enter it" in status.reason
    (waiting,) = read_reports(report_folder(run.logs, status.attempt_id))
    assert (waiting.rank, waiting.collective, waiting.layer, waiting.step) == (0, "counts", "layers.1", 1)
    assert (waiting.send, waiting.receive) == ((4, 3), (4, 4))  # a count of rows, and one per expert (3 text, 2 image)
    assert waiting.seconds > SECONDS
    log = run.log_of(0).read_text()
    assert "rank 0 has been in 'counts' of layers.1" in log
    assert json.loads((run.path / "status.json").read_text())["reason"] == status.reason


def suspend_the_ranks(run: RunFolder, seconds: float, suspended: list[psutil.Process]) -> None:
    """Waits for two steps, then suspends all ranks for some seconds."""
    while not run.metrics_jsonl.is_file() or len(steps(run)) < 2:
        time.sleep(0.1)
    suspended += [child for child in psutil.Process().children() if "tests.support.slowed" in child.cmdline()]
    for rank in suspended:
        rank.suspend()
    time.sleep(seconds)
    for rank in suspended:
        rank.resume()


def steps(run: RunFolder) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in run.metrics_jsonl.read_text().splitlines())
    return [reproducible_part(line) for line in lines if line["kind"] == "step"]


@pytest.mark.exhaustive  # starts two whole runs, and suspends one for half a minute
def test_a_run_suspended_for_longer_than_its_timeout_comes_to_the_same_records(tiny_data: Path, tmp_path: Path) -> None:
    """The suspension has the effect of `scontrol suspend`. The run continues, or restarts from its checkpoint if a
    collective has timed out."""
    changes = {"train.steps": 6, "checkpoint.every": 2, "evaluation.every": 6, "parallel.timeout_seconds": SECONDS}
    runs: list[RunFolder] = []
    suspended: list[psutil.Process] = []
    for name in ("undisturbed", "suspended"):
        config = tiny_config(tiny_data, tmp_path, {**changes, "run.name": name})
        runs.append(RunFolder.of(config))
        thread = threading.Thread(target=suspend_the_ranks, args=(runs[-1], 1.5 * SECONDS, suspended), daemon=True)
        if name == "suspended":
            thread.start()
        path = write_config(config, tmp_path / f"{name}.yaml")
        assert launch(path, program=tuple(slowed.PROGRAM.split()), max_restarts=1) == 0
    assert len(suspended) == 2
    assert [each.verdict for each in runs[1].read_status().attempts] in ([0], [1, 0])
    assert steps(runs[1]) == steps(runs[0])
