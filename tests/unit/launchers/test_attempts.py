"""Tests restarts by the local launcher and the Ray launcher. test_verdict.py tests the verdict of each attempt."""

from pathlib import Path

import pytest

from launchers.attempts import begin_logs, run_attempts
from launchers.rank_tracker import Outcome
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopSignals
from tests.support.tiny import tiny_config


def test_the_rank_at_fault_is_blamed_and_not_the_one_that_ended_first(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder, blamed = RunFolder.of(config), list[int]()

    def run(restarts: int, attempt_id: str) -> Outcome:
        lease = folder.open(config, RankEnv(0, 2, 0, 2, "published", restarts, attempt_id))
        begin_logs(folder, 2, attempt_id)
        assert folder.write_status(verdict=1, reason="CUDA error", last_step=1, attempt_id=attempt_id, rank=1)
        lease.release()
        return Outcome((1, 1), (0, 1))

    assert run_attempts(folder, run, StopSignals(), prefix="local", max_restarts=1, blame=blamed.append) == 1
    assert blamed == [1, 1]
    assert [each.reason for each in folder.read_status().attempts] == ["CUDA error"] * 2


@pytest.mark.parametrize(
    ("codes", "steps", "starts", "said"),
    [
        ([-9, 1, 1, 0], [1, 2, 3, 4], 4, ""),  # faults of any kind, each after a new checkpoint
        ([-9, -9, 0], [1, 1, 1], 3, ""),
        ([-9, -9, 0], [0, 0, 0], 2, "2 failed attempts in a row committed no checkpoint after step 0"),
        ([1] * 9, list(range(1, 10)), 4, "it was restarted 3 times already (--max-restarts)"),
        *(([code, 0], [1, 1], 1, "") for code in (78, 69, 65, 70, 75)),
    ],
)
def test_local_and_ray_restart_by_one_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[int], steps: list[int], starts: int, said: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    for made in (folder.logs, folder.checkpoints):
        made.mkdir(parents=True)
    begun: list[int] = []

    def run(restarts: int, attempt_id: str) -> Outcome:
        begun.append(restarts)
        (folder.checkpoints / "latest").write_text(f"step_{steps[restarts]}")
        code = codes[restarts]
        begin_logs(folder, 1, attempt_id)
        return Outcome((code,), (0,) if code not in (0, 75) else ())

    run_attempts(folder, run, StopSignals(), prefix="local", max_restarts=3)
    assert begun == list(range(starts))
    assert said in capsys.readouterr().err
