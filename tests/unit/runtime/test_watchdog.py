"""Tests the diagnosis of a hang and the watchdog thread. tests/integration suspends whole ranks."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.runtime.watchdog import Report, Watchdog, judge, read_reports, report_folder

WAITS = Report(
    attempt="a",
    rank=0,
    step=5,
    collective="dispatch rows",
    layer="layers.1",
    send=(0, 3),
    receive=(0, 4),
    seconds=21.0,
    entered=40,
    at="all_to_all.py:60 wait",
)


LATER = replace(WAITS, collective="label counts", layer="", entered=60)
BUSY = replace(WAITS, rank=1, collective=None, layer="", entered=39, at="loader.py:12 read")
BEHIND = replace(WAITS, rank=1, collective="checkpoint vote to write", layer="", entered=39)
HANGS = "collective 'dispatch rows' of layers.1 did not finish in 20 s at step 5; "
NO_REPORT = "did not enter it and wrote no report: suspended, dead, or unable to write to the run folder"
ENTERED = "all ranks have entered it: check the network between them, and their split sizes"


@pytest.mark.parametrize(
    ("reports", "world_size", "why", "at_fault"),
    [
        ([WAITS], 2, f"rank 1 {NO_REPORT}", 1),
        # Ranks 2 and 3 wait for rank 0 in a later collective. The rank that rank 0 waits for is named.
        ([replace(LATER, rank=2), replace(LATER, rank=3), WAITS], 4, f"rank 1 {NO_REPORT}", 1),
        ([WAITS, BUSY], 2, "rank 1 did not enter it: no collective, at loader.py:12 read", 1),
        (
            [WAITS, replace(WAITS, rank=2), BEHIND],
            3,
            "rank 1 did not enter it: 'checkpoint vote to write', at all_to_all.py:60 wait",
            1,
        ),
        ([WAITS, replace(WAITS, rank=1)], 2, ENTERED, None),
        ([WAITS], 64, f"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 55 more {NO_REPORT}", 1),
    ],
    ids=["no report", "chained waits", "outside any collective", "another collective", "all in it", "many ranks"],
)
def test_the_ranks_that_the_others_wait_for_are_at_fault(
    reports: list[Report], world_size: int, why: str, at_fault: int | None
) -> None:
    assert judge(reports, world_size, seconds=20.0) == (HANGS + why, at_fault)


def dog(
    tracker: CollectiveTracker,
    logs: Path,
    rank: int,
    ends: list[tuple[str, int | None]],
    done: threading.Event,
    *,
    step: Callable[[], int] = lambda: 7,
) -> Watchdog:
    def end(reason: str, at_fault: int | None) -> None:
        ends.append((reason, at_fault))
        done.set()

    return Watchdog(
        tracker, rank=rank, world_size=2, attempt_id="a", seconds=0.2, logs=logs, step=step, end=end
    ).start()  # fmt: skip


def test_a_late_collective_is_written_down_and_ends_the_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, ends, done = CollectiveTracker(), [], threading.Event()
    with tracker.inside("combine rows", device=torch.device("cpu"), layer="layers.0", send=[0, 2], receive=[0, 1]):
        dog(tracker, tmp_path, 0, ends, done)
        assert done.wait(600)
    (report,) = read_reports(report_folder(tmp_path, "a"))
    assert (report.rank, report.step, report.collective, report.layer) == (0, 7, "combine rows", "layers.0")
    assert (report.send, report.receive, report.entered) == ((0, 2), (0, 1), 1)
    assert report.seconds > 0.2
    reason, at_fault = ends[0]
    assert "'combine rows' of layers.0" in reason
    assert "rank 1 did not enter it" in reason
    assert at_fault == 1, "not the rank that reports"
    assert "sends [0, 2], receives [0, 1]" in caplog.text


def test_a_rank_that_waits_for_nothing_reports_when_a_peer_does(tmp_path: Path) -> None:
    ends, done = [], threading.Event()
    folder = report_folder(tmp_path, "a")
    folder.mkdir()
    dog(CollectiveTracker(), tmp_path, 1, ends, done)
    assert done.wait(600)
    (report,) = read_reports(folder)
    assert (report.rank, report.collective) == (1, None)
    assert "test_watchdog.py" in report.at or "threading" in report.at  # the place where the main thread is


def test_the_process_ends_whatever_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, ends, done = CollectiveTracker(), [], threading.Event()

    def no_step() -> int:
        raise ZeroDivisionError("no step")

    with tracker.inside("combine rows", device=torch.device("cpu")):
        dog(tracker, tmp_path, 0, ends, done, step=no_step)
        assert done.wait(600)
    assert ends == [("a collective did not finish in 0.2 s; the watchdog could not determine which one", None)]
    assert "no step" in caplog.text
