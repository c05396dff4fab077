"""Timeouts and cause of failure of an attempt, step by step."""

import signal

from launchers.rank_tracker import Outcome, RankTracker, ShutdownTimeouts

PATIENCE = ShutdownTimeouts(stop=60.0, peers=2.0, kill=4.0)


def nobody() -> tuple[int, ...]:
    return ()


def test_a_lost_rank_is_the_cause_although_peers_failed_before() -> None:
    course = RankTracker(3, PATIENCE)
    course.end(0, 1, 10.0, frozen=nobody)
    assert not course.must_terminate(11.9)
    assert course.must_terminate(12.0)
    assert not course.must_terminate(12.1)  # once
    course.end(1, -15, 12.5, frozen=nobody)
    assert not course.must_kill(15.9)
    assert course.must_kill(16.0)
    course.end(2, -9, 16.5, frozen=nobody, lost="its node does not answer")
    assert course.over
    outcome = course.outcome(None)
    assert outcome == Outcome((1, -15, -9), 2, None, aborted=False, lost={2: "its node does not answer"})
    assert outcome.silent


def test_a_rank_killed_for_a_timeout_is_not_the_cause() -> None:
    course = RankTracker(2, PATIENCE)
    course.end(0, 65, 0.0, frozen=nobody)
    course.end(1, -9, 6.0, frozen=nobody)
    assert course.outcome(None).first_failed == 0


def test_a_frozen_rank_is_the_cause_and_is_looked_for_once() -> None:
    course, looks = RankTracker(3, PATIENCE), []

    def look() -> tuple[int, ...]:
        looks.append(1)
        return (2,)

    for rank in range(3):
        course.end(rank, 1, float(rank), frozen=look)
    assert course.outcome(None).first_failed == 2
    assert len(looks) == 1


def test_a_stop_has_its_own_timeout() -> None:
    course = RankTracker(2, PATIENCE)
    course.stop(100.0)
    assert not course.must_kill(159.0)
    assert course.must_kill(160.0)
    for rank in range(2):
        course.end(rank, 75, 120.0, frozen=nobody)
    assert not course.failed
    assert course.outcome(signal.SIGTERM) == Outcome((75, 75), None, signal.SIGTERM, aborted=False)
