"""Ends a run that hangs in a collective, and names the ranks for which all others wait. Each rank writes a report:

    log/watchdog_<attempt>/rank_R.json     position of rank R as a JSON object: collective, layer, splits, seconds, step

On each rank a thread polls the `CollectiveTracker`. If a collective exceeds its time limit, the rank writes a report into a
folder. The other ranks notice the folder and write reports, too. Then each rank reads all reports, records the verdict (the
first record counts) and ends its process, because its main thread is blocked in the collective. A rank without a report is
suspended or dead, or cannot access the run folder. The thread communicates only through the file system.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.comm.tracker import CollectiveTracker, Position
from moe_dist.config.json_text import read_json
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.rendezvous import ranks_text

POLLS = 20  # number of polls per time limit, so that a hang ends after at most 1.2 times the limit
LONGEST_POLL_SECONDS = 5.0
_MOST_REPORT = 1 << 22  # largest size of a report
SETTLE_POLLS = 3  # number of poll intervals in which the other ranks write their reports

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """A rank's position in the program: the collective that it has not finished, and the source line that it executes.

    Attributes:
        step: Last completed optimizer step.
        collective: Name of the oldest unfinished collective; None if there is none.
        layer: Name of the layer that issued the collective; empty if no layer did.
        send, receive: Split sizes of the collective: numbers of items sent to and received from each rank of the group.
        seconds: Time since the rank entered the collective.
        entered: Number of collectives that the rank has entered, up to and including the unfinished one.
        at: Source line of the package that the main thread executes.
    """

    attempt: str
    rank: int
    step: int
    collective: str | None
    layer: str
    send: tuple[int, ...]
    receive: tuple[int, ...]
    seconds: float
    entered: int
    at: str

    @property
    def place(self) -> str:
        """Returns a text that names the unfinished collective."""
        if self.collective is None:
            return "no collective"
        return f"'{self.collective}'" + (f" of {self.layer}" if self.layer else "")

    def line(self) -> str:
        """Returns the report as one line, for the rank's log."""
        if self.collective is None:
            return f"rank {self.rank} is in no collective (step {self.step}, {self.entered} entered); at {self.at}"
        return (
            f"rank {self.rank} has been in {self.place} for {self.seconds:.1f} s (step {self.step}); sends "
            f"{list(self.send)}, receives {list(self.receive)}; its collective number {self.entered}; at {self.at}"
        )


def report_folder(logs: Path, attempt_id: str) -> Path:
    """Returns the folder for an attempt's reports. The first rank that writes a report creates it."""
    return logs / f"watchdog_{attempt_id}"


def read_reports(folder: Path) -> list[Report]:
    """Reads all reports in the folder, ordered by rank."""
    found = [read_json(path, most_bytes=_MOST_REPORT) for path in folder.glob("rank_*.json")] if folder.is_dir() else []
    reports = [Report(**{**each, "send": tuple(each["send"]), "receive": tuple(each["receive"])}) for each in found]
    return sorted(reports, key=lambda report: report.rank)


def judge(reports: Sequence[Report], world_size: int, seconds: float) -> tuple[str, int | None]:
    """Finds the ranks for which the others wait. Returns a diagnosis as a message, and the first of these ranks, which is
    None if all ranks are in the same collective.

    The culprits are the ranks without a report. If all have reports, they are the ranks outside any collective. If there
    are none, they are the ranks that have entered fewer collectives than others (all ranks issue the same collectives in
    the same order). Of all waiting ranks, the one that has entered the fewest collectives waits directly for them.

    Args:
        reports: All reports. At least one must come from a rank inside a collective.
        seconds: The time limit of a collective.
    """
    silent = tuple(sorted(set(range(world_size)) - {report.rank for report in reports}))
    inside = [report for report in reports if report.collective is not None]
    outside = tuple(report.rank for report in reports if report.collective is None)
    fewest = min(report.entered for report in inside)
    behind = tuple(report.rank for report in inside if report.entered == fewest)
    culprits = silent or outside or (behind if len(behind) < len(inside) else ())  # the strongest evidence decides
    nearest = [report for report in inside if report.rank not in culprits]
    waiting = min(nearest, key=lambda report: (report.entered, report.rank)) if nearest else inside[0]
    what = f"collective {waiting.place} did not finish in {seconds:g} s at step {waiting.step}"
    if silent:
        state = "suspended, dead, or unable to write to the run folder"
        why = f"{ranks_text(silent)} did not enter it and wrote no report: {state}"
    elif culprits:
        first = next(report for report in reports if report.rank in culprits)
        why = f"{ranks_text(culprits)} did not enter it: {first.place}, at {first.at}"
    else:
        why = "all ranks have entered it: check the network between them, and their split sizes"
    return f"{what}; {why}", next(iter(culprits), None)


class Watchdog:
    """The watchdog thread of one rank.

    Args:
        seconds: Time limit of a collective.
        step: Returns the current step.
        end: Function that the watchdog's thread calls with the reason and the rank for which the others wait (None if it is
            unknown). It must record both and end the process.
    """

    def __init__(
        self,
        tracker: CollectiveTracker,
        *,
        rank: int,
        world_size: int,
        attempt_id: str,
        seconds: float,
        logs: Path,
        step: Callable[[], int],
        end: Callable[[str, int | None], None],
    ) -> None:
        self._tracker, self._seconds = tracker, seconds
        self._rank, self._world_size, self._attempt_id = rank, world_size, attempt_id
        self._folder = report_folder(logs, attempt_id)
        self._step, self._end = step, end
        self._poll = min(seconds / POLLS, LONGEST_POLL_SECONDS)
        self._leave = threading.Event()
        self._main = threading.current_thread()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        """Starts the thread. Create the watchdog in the thread that issues the collectives."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread, unless it is already writing its report."""
        self._leave.set()

    def _run(self) -> None:
        while not self._leave.wait(self._poll):
            try:
                due = self._late() or self._folder.exists()  # costs one stat; the folder exists if a rank has reported
            except Exception as error:  # a transient file system error must not end the watchdog
                logger.warning("watchdog: %s", error)
                continue
            if due:
                return self._conclude()

    def _late(self) -> bool:
        position = self._tracker.oldest()
        return position is not None and time.monotonic() - position.since > self._seconds

    def _conclude(self) -> None:
        """Ends the process, even if the diagnosis raises an error."""
        reason = f"a collective did not finish in {self._seconds:g} s; the watchdog could not determine which one"
        at_fault = None
        try:
            reason, at_fault = self._diagnosis()
        except Exception:
            logger.exception("watchdog")
        self._end(reason, at_fault)

    def _diagnosis(self) -> tuple[str, int | None]:
        own = self._report(self._tracker.oldest())
        logger.error("%s", own.line())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Written atomically, because another rank may read the file at the same time.
            write_atomically(self._folder / f"rank_{self._rank}.json", json.dumps(asdict(own)) + "\n")
            time.sleep(self._poll * SETTLE_POLLS)  # waits until the other ranks have written their reports
            reports = read_reports(self._folder)
        except (OSError, ValueError, TypeError, KeyError) as error:  # names no culprit, because reports may be missing
            return f"{own.line()}; it cannot exchange reports with its peers: {error}", None
        if not any(each.collective for each in reports):
            return "the watchdog of a peer ended the run; the peer's log names the collective", None
        reason, at_fault = judge(reports, self._world_size, self._seconds)
        logger.error("%s; the reports of all ranks are in %s", reason, self._folder)
        return reason, at_fault

    def _report(self, position: Position | None) -> Report:
        return Report(
            attempt=self._attempt_id,
            rank=self._rank,
            step=self._step(),
            collective=position.collective if position else None,
            layer=position.layer if position else "",
            send=position.send if position else (),
            receive=position.receive if position else (),
            seconds=time.monotonic() - position.since if position else 0.0,
            entered=position.entered if position else self._tracker.entered,
            at=_line_of(self._main),
        )


def _line_of(thread: threading.Thread) -> str:
    """Returns the innermost source line of this package that a thread executes."""
    frame = sys._current_frames().get(thread.ident or 0)  # a snapshot, taken without stopping the thread
    frames = traceback.extract_stack(frame) if frame is not None else []
    ours = [each for each in frames if f"{os.sep}moe_dist{os.sep}" in each.filename] or frames
    if not ours:
        return "nowhere"
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
