"""Reads and writes two files of a run: status.json with the end of each attempt, and the durations of recent saves."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import FailFast, Field, TypeAdapter, ValidationError

from moe_dist.config.json_text import first_fault
from moe_dist.config.regular_file import read_regular
from moe_dist.errors import DataError
from moe_dist.runtime.files import write_atomically

SAVE_SECONDS = "save_seconds.json"  # name of the file with durations in a run's log folder
SAVES = 5  # largest number of durations in SAVE_SECONDS
MAX_STATUS_BYTES = 1 << 24  # enough for about 50,000 attempts
Number = Annotated[int, Field(ge=0, lt=1 << 53)]  # limited, so that it can be shown and divided
UnixSeconds = Annotated[float, Field(ge=0.0, lt=1e11)]  # limited, so that it can be shown as a date


@dataclass(frozen=True)
class AttemptRecord:
    """The record of one attempt in status.json.

    Attributes:
        restarts: Number of restarts before this attempt.
        host, pid: Host and process id of rank 0.
        started, ended: Unix seconds by the clock of the run folder's file system, because the clocks of hosts differ.
            `ended` is None while the attempt runs, and if it died without a record of its end.
        verdict: Exit code; None if `ended` is None.
        rank: The rank at fault: its error is the reason, or it did not enter a collective. None if it is unknown.
        last_step: Last completed step at the attempt's end. While the attempt runs, the last step of all earlier attempts.
        rank_host: Host of `rank`; empty if another process recorded the verdict.
    """

    attempt_id: str
    restarts: Number
    host: str
    pid: Number
    started: UnixSeconds
    ended: UnixSeconds | None = None
    verdict: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    reason: str = ""
    rank: Number | None = None
    last_step: Number = 0
    rank_host: str = ""


@dataclass(frozen=True)
class Status:
    """All attempts of a run. The latest is the last."""

    attempts: tuple[AttemptRecord, ...] = ()

    @property
    def latest(self) -> AttemptRecord | None:
        return self.attempts[-1] if self.attempts else None

    def of(self, attempt_id: str) -> AttemptRecord | None:
        return next((record for record in self.attempts if record.attempt_id == attempt_id), None)


def read_status(path: Path) -> Status:
    """Returns all attempts; empty if the file does not exist. Raises DataError if the file is damaged."""
    try:
        # reads the whole file at once, because a writer may replace it at any time
        text = read_regular(path, most_bytes=MAX_STATUS_BYTES, links=False)
    except FileNotFoundError:
        return Status()
    try:
        # FailFast, because pydantic would otherwise collect the faults of all attempts
        all_of_them = TypeAdapter(Annotated[tuple[AttemptRecord, ...], FailFast()])
        attempts = all_of_them.validate_python(json.loads(text)["attempts"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # a ValidationError is a ValueError
        why = first_fault(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: damaged ({why}); delete it and start again: the run resumes from its checkpoint and loses only the "
            "list of earlier attempts"
        ) from error
    return Status(attempts)


def write_status(path: Path, record: AttemptRecord, *, before_rename: Callable[[], None] | None = None) -> None:
    """Adds or replaces the entry of an attempt. The file's top level repeats the latest verdict, for `jq .verdict`."""
    attempts = [entry for entry in read_status(path).attempts if entry.attempt_id != record.attempt_id]
    summary = {
        "verdict": record.verdict,
        "reason": record.reason,
        "last_step": record.last_step,
        "restarts": len(attempts),
        "attempts": [asdict(entry) for entry in (*attempts, record)],
    }
    write_atomically(path, json.dumps(summary, indent=1) + "\n", before_rename=before_rename)  # costs one fsync


def record_save_seconds(logs: Path, seconds: float) -> None:
    """Adds a save's duration to the file with the last `SAVES` durations. Only rank 0 calls this function. A save lasts
    until its checkpoint is durable."""
    with contextlib.suppress(OSError):  # if the disk is full, the next step's record reports the error
        write_atomically(logs / SAVE_SECONDS, json.dumps([*_saves(logs), seconds][-SAVES:]) + "\n")


def measured_save_seconds(logs: Path) -> float | None:
    """Returns the duration in seconds of the longest of the last few saves; None if there was none. A grace period must be
    longer than this duration."""
    return max(_saves(logs), default=None)


def _saves(logs: Path) -> list[float]:
    try:
        found = json.loads(read_regular(logs / SAVE_SECONDS, most_bytes=1 << 16, links=False))
    except (OSError, ValueError, RecursionError):
        return []
    values = found if isinstance(found, list) else []
    return [float(each) for each in values if isinstance(each, int | float) and 0 <= each < 1e9]
