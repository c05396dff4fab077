"""If one rank is suspended, the watchdog's report names this rank, and the layer in which the other ranks wait."""

import json
from pathlib import Path

import pytest

from launchers.local import launch
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.watchdog import read_reports, report_folder
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
    status = run.read_status().attempts[-1]
    assert status.verdict == 1
    assert "collective 'counts' of layers.1 did not finish in 20 s at step 1; rank 1 did not enter it" in status.reason
    (waiting,) = read_reports(report_folder(run.logs, status.attempt_id))
    assert (waiting.rank, waiting.collective, waiting.layer, waiting.step) == (0, "counts", "layers.1", 1)
    assert (waiting.send, waiting.receive) == ((4, 3), (4, 4))  # row count, and a count per expert (3 or 2)
    assert waiting.seconds > SECONDS
    log = run.log_of(0).read_text()
    assert "rank 0 has been in 'counts' of layers.1" in log
    assert json.loads((run.path / "status.json").read_text())["reason"] == status.reason
