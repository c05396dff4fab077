"""Tests which exit codes lead to a restart, and how often."""

from pathlib import Path

import pytest

from launchers.restart import AttemptEnd, committed_step, why_not_restarted

FAILED, GAINED = AttemptEnd(1, 10, 10), AttemptEnd(1, 0, 10)
PREEMPTED = AttemptEnd(75, 10, 10)  # while it was starting
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
