"""Ends a run whose ranks wait for each other, and says who keeps whom waiting where.

    log/watchdog_<attempt>/rank_R.json     where rank R stood, one JSON object: collective, layer, splits, seconds, step

Each rank has a thread that looks at its `CollectiveTracker`. Where a collective has not finished in time the rank reports; the others
see the folder and report as well, also those that wait for nothing. A little later each reads all reports, writes the
verdict (the first one counts) and ends its process, since its main thread is inside a collective and cannot be asked to. A
rank that has written nothing is stopped, dead or cut off.

The thread needs the file system and nothing else: no collective, no process group. Looking costs one `stat` each POLLS-th
part of the time allowed.
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
from moe_dist.runtime.run_folder import write_atomically

POLLS = 20  # looks during the time allowed; so a collective is ended after at most 1.2 times that
LONGEST_POLL_SECONDS = 5.0
SETTLE_POLLS = 3  # looks that peers get to write their reports
SHOWN_RANKS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Where one rank stood.

    Attributes:
        attempt, rank, step: Who, and the last finished optimizer step.
        collective: Name of the first collective that had not finished; None where the rank was in none.
        layer: Name of the layer that called it; empty where no layer did.
        send, receive: Its split sizes, in items for and from each rank of its group.
        seconds: Since the rank entered it.
        entered: Collectives that the rank had entered, the unfinished one included and later ones not.
        at: Line of the package in which the main thread was.
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
        """The collective in words."""
        if self.collective is None:
            return "no collective"
        return f"'{self.collective}'" + (f" of {self.layer}" if self.layer else "")

    def line(self) -> str:
        """All of it in one line, for the rank's log."""
        if self.collective is None:
            return f"rank {self.rank} is in no collective (step {self.step}, {self.entered} entered); at {self.at}"
        return (
            f"rank {self.rank} has been in {self.place} for {self.seconds:.1f} s (step {self.step}); sends "
            f"{list(self.send)}, receives {list(self.receive)}; its collective number {self.entered}; at {self.at}"
        )


def report_folder(logs: Path, attempt_id: str) -> Path:
    """Where the ranks of an attempt write their reports; it is there only once one of them has."""
    return logs / f"watchdog_{attempt_id}"


def read_reports(folder: Path) -> list[Report]:
    """The reports that are there, by rank."""
    found = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")] if folder.is_dir() else []
    reports = [Report(**{**each, "send": tuple(each["send"]), "receive": tuple(each["receive"])}) for each in found]
    return sorted(reports, key=lambda report: report.rank)


@dataclass(frozen=True)
class Hang:
    """What the reports say together.

    Attributes:
        culprits: Ranks that the others wait for; empty where all are in the same collective.
        silent: Those of them that wrote no report.
        waiting: The report of the rank that waits for them most directly.
        reason: One sentence for people.
    """

    culprits: tuple[int, ...]
    silent: tuple[int, ...]
    waiting: Report
    reason: str


def judge(reports: Sequence[Report], world_size: int, seconds: float) -> Hang:
    """Who keeps whom waiting where.

    Ranks without a report come first; without any, ranks that are in no collective; without any, those that have entered
    fewer collectives than others, since all issue the same ones in the same order. Among the ranks that wait the one with
    the fewest is nearest to them: later ones wait for the waiting.

    Args:
        reports: At least one of a rank inside a collective.
        seconds: The time that was allowed.
    """
    silent = tuple(sorted(set(range(world_size)) - {report.rank for report in reports}))
    inside = [report for report in reports if report.collective is not None]
    outside = tuple(report.rank for report in reports if report.collective is None)
    fewest = min(report.entered for report in inside)
    behind = tuple(report.rank for report in inside if report.entered == fewest)
    culprits = silent or outside or (behind if len(behind) < len(inside) else ())
    nearest = [report for report in inside if report.rank not in culprits]
    waiting = min(nearest, key=lambda report: (report.entered, report.rank)) if nearest else inside[0]
    what = f"collective {waiting.place} did not finish in {seconds:g} s at step {waiting.step}"
    if silent:
        why = f"{_ranks(silent)} did not enter it and wrote no report: stopped, dead, or cut off from the run folder"
    elif culprits:
        first = next(report for report in reports if report.rank in culprits)
        why = f"{_ranks(culprits)} did not enter it: {first.place}, at {first.at}"
    else:
        why = "all ranks have entered it: look at the network between them, and at their split sizes"
    return Hang(culprits, silent, waiting, f"{what}; {why}")


class Watchdog:
    """The thread, from `start` to `stop`.

    Args:
        tracker: Of this rank.
        attempt_id: The same on all ranks.
        seconds: How long a collective may take.
        logs: Log folder of the run.
        step: Where the run stands.
        end: Called from the thread with the verdict's reason; it must write it down and end the process.
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
        end: Callable[[str], None],
    ) -> None:
        self._watch, self._seconds = tracker, seconds
        self._rank, self._world_size, self._attempt_id = rank, world_size, attempt_id
        self._folder = report_folder(logs, attempt_id)
        self._step, self._end = step, end
        self._poll = min(seconds / POLLS, LONGEST_POLL_SECONDS)
        self._leave = threading.Event()
        self._main = threading.current_thread()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        """Called in the thread that is watched."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread; one that is writing its report goes on."""
        self._leave.set()

    def _run(self) -> None:
        while not self._leave.wait(self._poll):
            try:
                due = self._late() or self._folder.exists()
            except Exception as error:  # a file system that fails for a moment must not end the watch
                logger.warning("watchdog: %s", error)
                continue
            if due:
                return self._conclude()

    def _late(self) -> bool:
        position = self._watch.oldest()
        return position is not None and time.monotonic() - position.since > self._seconds

    def _conclude(self) -> None:
        """Ends the process, whatever else fails on the way there."""
        reason = f"a collective did not finish in {self._seconds:g} s, and the watchdog cannot say which"
        try:
            reason = self._reason()
        except Exception:
            logger.exception("watchdog")
        self._end(reason)

    def _reason(self) -> str:
        own = self._report(self._watch.oldest())
        logger.error("%s", own.line())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"rank_{self._rank}.json", json.dumps(asdict(own)) + "\n")
            time.sleep(self._poll * SETTLE_POLLS)
            reports = read_reports(self._folder)
        except OSError as error:  # the peers' reports may not be there for the same reason: nobody is blamed
            return f"{own.line()}; it cannot exchange reports with its peers: {error}"
        if not any(each.collective for each in reports):
            return "a peer gave up waiting in a collective; its log says which"
        hang = judge(reports, self._world_size, self._seconds)
        logger.error("%s; the reports of all ranks are in %s", hang.reason, self._folder)
        return hang.reason

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
            entered=position.entered if position else self._watch.entered,
            at=_line_of(self._main),
        )


def _line_of(thread: threading.Thread) -> str:
    """The innermost line of the package that a thread is in."""
    frame = sys._current_frames().get(thread.ident or 0)
    frames = traceback.extract_stack(frame) if frame is not None else []
    ours = [each for each in frames if f"{os.sep}moe_dist{os.sep}" in each.filename] or frames
    if not ours:
        return "nowhere"
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN_RANKS])
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"
