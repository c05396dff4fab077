"""Tests the rank tracker's timeouts, and the cause that it gives for a failed attempt."""

import signal

import pytest

from launchers.rank_tracker import Outcome, RankTracker, ShutdownTimeouts
from moe_dist.runtime.signals import StopSignals

PATIENCE = ShutdownTimeouts(stop=60.0, peers=2.0, kill=4.0)
NONE = StopSignals()


def tracker(num_ranks: int) -> RankTracker:
    return RankTracker(num_ranks, PATIENCE, say=print)


def nobody() -> tuple[int, ...]:
    return ()


def test_a_lost_rank_is_the_cause_although_peers_failed_before() -> None:
    course = tracker(3)
    course.end(0, 1, 10.0, frozen=nobody)
    assert course.signals_due(NONE, 11.9) == []
    assert course.signals_due(NONE, 12.0) == [signal.SIGTERM]
    assert course.signals_due(NONE, 12.1) == []  # each signal is due only once
    course.end(1, -15, 12.5, frozen=nobody)
    assert course.signals_due(NONE, 15.9) == []
    assert course.signals_due(NONE, 16.0) == [signal.SIGKILL]
    course.end(2, -9, 16.5, frozen=nobody, lost="its node does not answer")
    assert course.over
    outcome = course.outcome(None)
    assert outcome == Outcome((1, -15, -9), (0, 1, 2), lost={2: "its node does not answer"})
    assert (outcome.cause(), outcome.exit_code(2)) == (2, 137)


def test_a_rank_killed_for_a_timeout_is_not_the_cause() -> None:
    course = tracker(2)
    course.end(0, 65, 0.0, frozen=nobody)
    course.end(1, -9, 6.0, frozen=nobody)
    assert course.outcome(None).failed == (0,)


def test_a_frozen_rank_is_the_cause_and_is_looked_for_once() -> None:
    course, looks = tracker(3), []

    def look() -> tuple[int, ...]:
        looks.append(1)
        return (2,)

    for rank in range(3):
        course.end(rank, 1, float(rank), frozen=look)
    assert course.outcome(None).cause() == 2
    assert len(looks) == 1


def test_a_stop_is_told_and_sent_once_and_has_its_own_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    course, signals = tracker(2), StopSignals()
    signals.first = signal.SIGTERM
    assert course.signals_due(signals, 100.0) == [signal.SIGTERM]
    assert capsys.readouterr().out == "SIGTERM: saving, then stopping\n"
    assert course.signals_due(signals, 159.0) == []
    assert course.signals_due(signals, 160.0) == [signal.SIGKILL]
    for rank in range(2):
        course.end(rank, 75, 120.0, frozen=nobody)
        assert signal.SIGTERM not in course.signals_due(signals, 200.0)
    assert not course.failed
    assert course.outcome(signal.SIGTERM) == Outcome((75, 75), stop=signal.SIGTERM)


def test_ranks_that_still_run_are_stopped_after_one_has_stopped_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    course = tracker(3)
    course.end(0, 75, 10.0, frozen=nobody)
    assert course.signals_due(NONE, 69.9) == []  # ranks 1 and 2 have 60 s to end by themselves
    assert course.signals_due(NONE, 70.0) == [signal.SIGTERM]
    assert "SIGTERM to the ranks that still run" in capsys.readouterr().out
    course.end(1, 75, 85.0, frozen=nobody)
    assert course.signals_due(NONE, 309.9) == []  # no second SIGTERM, and SIGKILL not before 310 s
    assert course.signals_due(NONE, 310.0) == [signal.SIGKILL]
    course.end(2, -15, 86.0, frozen=nobody)
    outcome = course.outcome(None)
    assert outcome == Outcome((75, 75, -15), (2,), signal.SIGTERM)
    assert (outcome.unready, outcome.exit_code(2)) == (True, 75)


def test_a_rank_that_stops_by_the_sigterm_after_a_failure_is_no_request_to_stop() -> None:
    course = tracker(3)
    course.end(2, 1, 10.0, frozen=nobody)
    assert course.signals_due(NONE, 12.0) == [signal.SIGTERM]
    course.end(0, 75, 13.0, frozen=nobody)
    course.end(1, 75, 13.0, frozen=nobody)
    assert course.outcome(None) == Outcome((75, 75, 1), (2,))


def test_a_rank_that_stops_before_the_sigterm_after_a_failure_was_asked_to() -> None:
    course = tracker(2)
    course.end(1, 1, 10.0, frozen=nobody)  # rank 0 was stopped, so rank 1 lost its store
    course.end(0, 75, 10.1, frozen=nobody)
    assert course.signals_due(NONE, 12.0) == [signal.SIGTERM]
    assert course.outcome(None).stop == signal.SIGTERM


def test_a_second_ctrl_c_kills_at_once() -> None:
    course, signals = tracker(1), StopSignals()
    signals.first, signals.interrupts = signal.SIGINT, 2
    assert course.signals_due(signals, 1.0) == [signal.SIGINT, signal.SIGKILL]
    course.end(0, -9, 1.1, frozen=nobody)
    assert course.outcome(signal.SIGINT).aborted
