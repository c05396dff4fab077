"""Reads a run's state, throughput, checkpoints and attempts from its run folder. Reads only the end of a large file."""

import contextlib
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter

from launchers.restart import committed_step
from moe_dist.config.regular_file import read_regular
from moe_dist.config.yaml_text import read_yaml
from moe_dist.errors import ConfigError, DataError, DivergedError, ResourceError, StoppedError
from moe_dist.runtime.files import lines_from_end
from moe_dist.runtime.hints import RecordedHint, read_hints
from moe_dist.runtime.lease import Holder, read_holder
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.status import AttemptRecord, Number, measured_save_seconds

RATE_STEPS = 20  # the shown throughput is the median over this many last steps
RECORDS_READ = 8 << 20  # bytes read from the end of metrics.jsonl
SILENT_SECONDS = 90.0  # age from which a lease counts as silent, unless it is renewed while this process watches it
BEAT_SECONDS = 6.0  # how long to watch for a renewal, which is due every 5 s
LEASE_BYTES = 1 << 16
_STEP_LINE = b'"kind":"step"'


class RunState(Enum):
    """The state that is shown for a run."""

    NEW = "not begun"
    RUNNING = "running"
    SILENT = "silent"  # a process holds the lease but has stopped renewing it
    DIED = "died"  # the latest attempt recorded no verdict
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    DIVERGED = "diverged"
    REFUSED = "refused"  # the configuration or the data are invalid, or no nodes are suitable
    UNREADABLE = "unreadable"


_STATES = {
    0: RunState.DONE,
    StoppedError.exit_code: RunState.STOPPED,
    DivergedError.exit_code: RunState.DIVERGED,
    ConfigError.exit_code: RunState.REFUSED,
    DataError.exit_code: RunState.REFUSED,
    ResourceError.exit_code: RunState.REFUSED,
}


@dataclass(frozen=True)
class _StepRecord:
    """The shown fields of a line of metrics.jsonl. Types are checked, because another user may have written the file."""

    step: Number
    scalars: dict[str, FiniteFloat | None]


_RECORD = TypeAdapter(_StepRecord)


@dataclass(frozen=True)
class RunProgress:
    """The state and progress of a run at one moment.

    Attributes:
        why: Reason for the end of the latest attempt, or the error in reading the run folder.
        step, total_steps: Last recorded step, and train.steps (None if the configuration cannot be read).
        tokens_per_second, step_seconds: Medians over the last steps; None before the first step.
        record_age, beat_age, checkpoint_age: Seconds since the last record, lease renewal and checkpoint commit.
        checkpoint_step: Step of the newest committed checkpoint; 0 without a checkpoint.
        save_seconds: Longest of the last saves; None before the first save.
        holder: The process that holds the lease; None without a holder.
        hints: Last hint of each kind, in the order of their steps.
    """

    name: str
    folder: Path
    state: RunState
    why: str = ""
    step: int = 0
    total_steps: int | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    record_age: float | None = None
    beat_age: float | None = None
    checkpoint_step: int = 0
    checkpoint_age: float | None = None
    save_seconds: float | None = None
    losses: Mapping[str, float] | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    holder: Holder | None = None
    hints: tuple[RecordedHint, ...] = ()

    @property
    def remaining_seconds(self) -> float | None:
        """Seconds to the last step at the current throughput; None if the state is not RUNNING or no throughput is
        known."""
        if self.state is not RunState.RUNNING or self.total_steps is None or self.step_seconds is None:
            return None
        seconds = max(0, self.total_steps - self.step) * self.step_seconds
        return seconds if math.isfinite(seconds) else None


def read_progress(path: Path, *, now: float | None = None) -> RunProgress:
    """Reads the run in `path` at `now` in Unix seconds; the default is this host's clock. If status.json is damaged or
    unreadable, the state is UNREADABLE and `why` is the error."""
    now = time.time() if now is None else now
    folder = RunFolder(path)
    try:
        attempts, unreadable = folder.read_status().attempts, ""
    except (DataError, OSError) as error:
        attempts, unreadable = (), str(error)
    records = _last_records(folder.metrics_jsonl)
    latest = attempts[-1] if attempts else None
    step = records[0].step if records else 0
    holder = None
    with contextlib.suppress(OSError):
        holder = read_holder(folder.lease_json)
    if holder is not None and (holder.is_dead() or _has_ended(latest, holder)):
        holder = None  # the holder died or recorded its end, but did not release the lease
    if holder is not None and (_age(folder.lease_json, now) or 0.0) >= SILENT_SECONDS:
        now = _time_of_beat(folder.lease_json) or now
    beat_age = _age(folder.lease_json, now)
    state = RunState.UNREADABLE if unreadable else _state(latest, holder, beat_age)
    committed = committed_step(folder.checkpoints)
    return RunProgress(
        name=path.name,
        folder=path,
        state=state,
        why=unreadable or (latest.reason if latest is not None else ""),
        step=max(step, latest.last_step if latest is not None and latest.verdict is not None else 0),
        total_steps=_total_steps(folder.config_yaml),
        tokens_per_second=_median(records, "perf/tokens_per_second"),
        step_seconds=_median(records, "perf/step_seconds"),
        record_age=_age(folder.metrics_jsonl, now) if records else None,
        beat_age=beat_age if holder is not None else None,
        checkpoint_step=committed,
        checkpoint_age=_age(folder.checkpoints / "latest", now) if committed else None,
        save_seconds=measured_save_seconds(folder.logs),
        losses=_losses(records[0]) if records else None,
        attempts=attempts,
        holder=holder,
        hints=read_hints(folder.metrics_jsonl, most_bytes=RECORDS_READ),
    )


def is_run(path: Path) -> bool:
    """Returns whether a folder is a run folder. A Slurm job's snapshot has a config.yaml, too, but also a folder `code`."""
    return (path / "status.json").is_file() or ((path / "config.yaml").is_file() and not (path / "code").is_dir())


def _has_ended(latest: AttemptRecord | None, holder: Holder) -> bool:
    return latest is not None and latest.verdict is not None and latest.attempt_id == holder.attempt_id


def _state(latest: AttemptRecord | None, holder: Holder | None, beat_age: float | None) -> RunState:
    if holder is not None:
        return RunState.RUNNING if beat_age is not None and beat_age < SILENT_SECONDS else RunState.SILENT
    if latest is None:
        return RunState.NEW
    return RunState.DIED if latest.verdict is None else _STATES.get(latest.verdict, RunState.FAILED)


def _time_of_beat(lease_json: Path) -> float | None:
    """Waits for the next heartbeat of a lease. Returns the heartbeat's time by the file system's clock, which may
    differ from this host's clock; None without a heartbeat."""
    deadline = time.monotonic() + BEAT_SECONDS
    with contextlib.suppress(OSError):
        before = read_regular(lease_json, most_bytes=LEASE_BYTES, links=False)
        while time.monotonic() < deadline:
            if read_regular(lease_json, most_bytes=LEASE_BYTES, links=False) != before:
                return lease_json.stat().st_mtime
            time.sleep(0.1)
    return None


def _last_records(path: Path) -> list[_StepRecord]:
    """Returns the last records of steps, newest first, at most RATE_STEPS; skips lines that are not valid records."""
    found: list[_StepRecord] = []
    with contextlib.suppress(OSError):
        for line in lines_from_end(path, most_bytes=RECORDS_READ):
            if _STEP_LINE not in line[:100]:
                continue
            with contextlib.suppress(ValueError):
                found.append(_RECORD.validate_json(line))
            if len(found) == RATE_STEPS:
                break
    return found


def _median(records: list[_StepRecord], tag: str) -> float | None:
    values = [v for record in records if (v := record.scalars.get(tag)) is not None]
    return statistics.median(values) if values else None


def _losses(record: _StepRecord) -> dict[str, float]:
    return {tag.partition("/")[2]: v for tag, v in record.scalars.items() if tag.startswith("loss/") and v is not None}


def _total_steps(config_yaml: Path) -> int | None:
    """Returns train.steps, or None. Reads no other key, because this version may reject keys of an old configuration."""
    try:
        values, _ = read_yaml(config_yaml, links=False)
        steps = int(values["train"]["steps"])
        return steps if 0 < steps < 1 << 53 else None
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None
