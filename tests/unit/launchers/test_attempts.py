"""Tests which exit codes lead to a restart, and how often, by the rule and by the local launcher and the Ray launcher.
test_verdict.py tests the verdict of each attempt."""

from pathlib import Path

import pytest

from launchers.attempts import begin_logs, run_attempts
from launchers.rank_tracker import Outcome
from launchers.restart import AttemptEnd, committed_step, why_not_restarted
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


FAILED, GAINED = AttemptEnd(1, 10, 10), AttemptEnd(1, 0, 10)
PREEMPTED = AttemptEnd(75, 10, 10)  # preempted while it was starting
KILLED_IN_STOP = AttemptEnd(1, 10, 10, asked=True)
LIMIT = "it was restarted 3 times already (max_restarts)"
FRUITLESS = "2 failed attempts in a row committed no checkpoint after step 10"


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([GAINED] * 3, None),
        ([GAINED] * 4, LIMIT),
        ([FAILED], None),
        ([GAINED, FAILED], None),
        ([FAILED, GAINED, FAILED], None),
        ([GAINED, FAILED, FAILED], FRUITLESS),
        # Stops that the user or Slurm requested: a preemption, a time limit, a requeue.
        ([PREEMPTED] * 3, None),
        ([KILLED_IN_STOP] * 3, None),
        ([FAILED, PREEMPTED], None),
        ([AttemptEnd(75, 4, 5), AttemptEnd(75, 5, 6)], None),
        ([FAILED, PREEMPTED, FAILED], FRUITLESS),
        ([FAILED, AttemptEnd(75, 10, 15), AttemptEnd(1, 15, 15)], None),
        ([PREEMPTED] * 4, LIMIT),
    ],
)
def test_only_failures_without_a_new_checkpoint_and_the_limit_end_a_run(
    attempts: list[AttemptEnd], reason: str | None
) -> None:
    assert why_not_restarted(attempts, 3) == reason


def test_no_restart_is_allowed_where_the_limit_is_0() -> None:
    assert why_not_restarted([GAINED], 0, option="--max-restarts") == "--max-restarts=0"


@pytest.mark.parametrize(("text", "step"), [("step_40\n", 40), ("step_x", 0), ("", 0), (None, 0)])
def test_the_step_of_the_newest_checkpoint(tmp_path: Path, text: str | None, step: int) -> None:
    if text is not None:
        (tmp_path / "latest").write_text(text)
    assert committed_step(tmp_path) == step
