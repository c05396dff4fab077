"""A rank that is stopped on purpose, and one that goes on elsewhere: the report names the rank, and the layer in which the
others wait for it."""

import json
from pathlib import Path

import pytest

from launchers.local import launch
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.watchdog import read_reports, report_folder
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config

SETTINGS = {
    "evaluation.every": 1000,
    "checkpoint.every": 1000,
    "parallel.watchdog_seconds": 4.0,
    "monitor.sinks": [{"kind": "jsonl"}],
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["freeze", "sleep"])
def test_the_report_names_rank_and_layer(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name, value in fault(rank=1, step=2, phase="before_layer_1", kind=kind).items():
        monkeypatch.setenv(name, value)
    config = tiny_config(tiny_data, tmp_path, SETTINGS)
    assert launch(write_config(config, tmp_path / "run.yaml"), program=PROGRAM) == 1
    run = RunFolder.of(config)
    status = run.read_status().latest
    assert status is not None
    assert status.verdict == 1
    assert "collective 'counts' of layers.1 did not finish in 4 s at step 1" in status.reason
    assert "rank 1 did not enter it" in status.reason
    reports = read_reports(report_folder(run.logs, status.attempt_id))
    assert [report.rank for report in reports] == ([0] if kind == "freeze" else [0, 1])
    waiting = reports[0]
    assert (waiting.collective, waiting.layer, waiting.step) == ("counts", "layers.1", 1)
    assert len(waiting.send) == len(waiting.receive) == 2
    assert sum(waiting.send) == 7  # two counts of rows and five of experts
    if kind == "sleep":
        assert reports[1].collective is None
        assert "in no collective" in status.reason
    log = run.log_of(0).read_text()
    assert "rank 0 has been in 'counts' of layers.1" in log
    assert json.loads((run.path / "status.json").read_text())["reason"] == status.reason
