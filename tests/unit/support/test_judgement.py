"""The requirements of campaigns: each accepts a correct run, and finds a faulty one."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.fault_plan import Fault, FaultPlan
from tests.support.judgement import TRIED_AGAIN, in_flight, look_back, too_many_redone, unexpected
from tests.support.tiny import tiny_config

ENOSPC = Fault(0, rank=1, step=4, phase="checkpoint write", kind="ENOSPC")
EXCEPTION = Fault(1, rank=0, step=12, phase="forward", kind="exception")


class Broken:
    """A run of one attempt after some faults, as it is on disk."""

    def __init__(self, tmp_path: Path, *, verdict: int, log: str, problems: tuple[Fault, ...] = (ENOSPC,)) -> None:
        config = tiny_config(tmp_path / "data", tmp_path / "runs")
        self.run, struck = RunFolder.of(config), tmp_path / "struck"
        struck.mkdir()
        lease = self.run.open(config, RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="first"))
        reason = "RuntimeError: a fault that a test injected" if verdict else "done"
        assert self.run.write_status(verdict=verdict, reason=reason, last_step=20, attempt_id="first")
        lease.release()
        self.plan = FaultPlan(problems, struck, tmp_path / "data", None)
        for fault in problems:
            step = 5 if fault is ENOSPC else fault.step
            record = {"time": 100.0, "attempt": "first", "step": step}
            (struck / f"struck_{fault.number}").write_text(json.dumps(record))
        for rank in (0, 1):
            self.run.log_of(rank).write_text(f"--- attempt none, 1\n{TRIED_AGAIN}\n--- attempt first, 2\n{log}")

    def problems(self, **end: Any) -> list[str]:
        ends = [{"attempt": "first", "time": 101.0, "step": 20, "committed": 20, "trained": True, **end}]
        return look_back(self.plan, self.run, ends)[1]


def test_a_save_that_failed_must_not_end_the_attempt(tmp_path: Path) -> None:
    (problem,) = Broken(tmp_path, verdict=1, log=f"{TRIED_AGAIN}\n").problems()
    assert "a save that failed ended the attempt" in problem


def test_unless_something_else_did(tmp_path: Path) -> None:
    assert Broken(tmp_path, verdict=1, log=f"{TRIED_AGAIN}\n", problems=(ENOSPC, EXCEPTION)).problems() == []


def test_two_saves_that_failed_are_no_excuse_for_each_other(tmp_path: Path) -> None:
    other = Fault(1, rank=0, step=12, phase="commit", kind="EIO")
    assert len(Broken(tmp_path, verdict=1, log=f"{TRIED_AGAIN}\n", problems=(ENOSPC, other)).problems()) == 2


def test_a_save_that_failed_must_be_in_the_log_of_its_attempt(tmp_path: Path) -> None:
    broken = Broken(tmp_path, verdict=0, log="nothing\n")
    (problem,) = broken.problems()
    assert "the log does not say that the next interval tries again" in problem
    broken.run.log_of(1).write_text(f"--- attempt first, 2\n{TRIED_AGAIN}\n--- attempt next, 3\n")
    assert broken.problems() == []


def test_or_have_ended_before_it_could_be_told(tmp_path: Path) -> None:
    broken = Broken(tmp_path, verdict=1, log="nothing\n", problems=(ENOSPC, EXCEPTION))
    assert broken.problems(step=8, committed=0) == []
    assert broken.problems(step=11, committed=0) != []


@pytest.mark.parametrize(
    ("step", "committed", "missed", "unfinished", "too_many"),
    [
        (20, 15, 0, None, False),
        (21, 15, 0, None, True),
        (21, 15, 1, None, False),
        (24, 15, 0, 20, False),  # the save of step 20 was in flight, which is allowed
        (24, 15, 0, 15, True),  # no save was in flight, because the save of step 15 had finished
        (26, 15, 0, 20, True),  # the save of step 25 should have waited for the save of step 20
        (24, 10, 0, 20, True),  # the save of step 20 should have waited for the save of step 15
        (24, 10, 1, 20, False),
        (16, 15, 0, 15, False),
    ],
)
def test_what_is_lost_is_one_interval_and_what_was_in_flight(
    step: int, committed: int, missed: int, unfinished: int | None, too_many: bool
) -> None:
    assert too_many_redone({"step": step, "committed": committed}, missed, unfinished) is too_many


def test_what_an_attempt_lost_that_took_no_step_was_its_predecessors(tmp_path: Path) -> None:
    broken = Broken(tmp_path, verdict=0, log=f"{TRIED_AGAIN}\n")
    assert "are taken again" in broken.problems(committed=5)[0]
    assert broken.problems(committed=5, trained=False) == []


def test_the_save_in_flight_is_the_one_that_was_begun_and_not_finished() -> None:
    begun, durable = "x checkpoint step_{}: training went on after 0.1 s\n", "checkpoint step_{}: durable after 1 s\n"
    assert in_flight("") is None
    assert in_flight(begun.format(5) + durable.format(5)) is None
    assert in_flight(begun.format(5) + durable.format(5) + begun.format(10)) == 10
    assert in_flight(durable.format(5) + begun.format(5)) is None


def test_an_attempt_must_end_as_its_fault_says() -> None:
    seen = {"to_end": 1.0, "verdict": 1, "reason": "RuntimeError: a fault that a test injected", "named": 0}
    assert list(unexpected(EXCEPTION, seen)) == []
    assert list(unexpected(EXCEPTION, {**seen, "to_end": 11.0})) == ["the others ended 11.0 s after it"]
    assert list(unexpected(EXCEPTION, {**seen, "verdict": 65})) == ["the verdict is not 1"]
    assert list(unexpected(EXCEPTION, {**seen, "reason": "lost"})) == ["the reason is not the exception"]
