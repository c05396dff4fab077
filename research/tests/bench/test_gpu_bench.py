"""Tests the share of a step in which no kernel runs, and rehearses measurements of steps on the CPU."""

from pathlib import Path

import pytest

from research.gpu_bench.__main__ import MEASUREMENTS
from research.gpu_bench.profiled import Profiled, idle_share
from tools.gpu_check.outcome import CheckJob
from tools.gpu_check.session import run_checks


def test_overlapping_kernels_count_once_and_gaps_are_idle() -> None:
    assert idle_share([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 10.0)]) == Profiled(4, pytest.approx(0.3))
    assert idle_share([(8.0, 10.0), (0.0, 8.0)]) == Profiled(2, 0.0)
    assert idle_share([]) == Profiled(0, 0.0)


@pytest.mark.exhaustive
def test_measurements_of_steps_pass_their_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    job = CheckJob(gpus=2, rehearse=True, folder=tmp_path)
    checks = {name: MEASUREMENTS[name] for name in ("ceilings", "syncs", "exchanges", "preset", "long run")}
    found = run_checks(checks, job, tmp_path / "results.json", {"card": "a card"}, minutes=60.0)
    assert {name: each.verdict for name, each in found.items()} == dict.fromkeys(checks, "pass"), found
