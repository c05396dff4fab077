"""status.json: how each attempt of a run ended."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moe_dist.errors import DataError
from moe_dist.runtime.files import write_atomically


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt in status.json.

    Attributes:
        attempt_id, restarts: Its name, and how often its launcher had restarted the job before.
        host, pid: Of rank 0.
        started, ended: Unix seconds; ended is None while it runs, or when it died without a word.
        verdict: Exit code; None likewise.
        reason: In words.
        rank: The rank that gave the verdict.
        last_step: Last step taken.
    """

    attempt_id: str
    restarts: int
    host: str
    pid: int
    started: float
    ended: float | None = None
    verdict: int | None = None
    reason: str = ""
    rank: int | None = None
    last_step: int = 0


@dataclass(frozen=True)
class Status:
    """All attempts of a run, the latest last."""

    attempts: tuple[AttemptRecord, ...] = ()

    @property
    def latest(self) -> AttemptRecord | None:
        return self.attempts[-1] if self.attempts else None

    def of(self, attempt_id: str) -> AttemptRecord | None:
        """The entry of one attempt."""
        return next((ending for ending in self.attempts if ending.attempt_id == attempt_id), None)


def read_status(path: Path) -> Status:
    """All attempts; empty where the file is not there.

    Raises:
        DataError: it is damaged.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Status()
    try:
        attempts = TypeAdapter(tuple[AttemptRecord, ...]).validate_python(json.loads(text)["attempts"])
    except (ValueError, TypeError, KeyError) as error:  # a ValidationError is a ValueError
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: damaged ({why}); move it away and start again: the run goes on from its checkpoint, and only the "
            "list of its earlier attempts is lost"
        ) from error
    return Status(attempts)


def write_status(path: Path, ending: AttemptRecord, *, before_rename: Callable[[], None] | None = None) -> None:
    """Adds an attempt, or replaces its entry; the fields of the latest also stand at the top, for `jq .verdict`.

    Args:
        before_rename: As in `write_atomically`.
    """
    attempts = [entry for entry in read_status(path).attempts if entry.attempt_id != ending.attempt_id]
    summary = {
        "verdict": ending.verdict,
        "reason": ending.reason,
        "last_step": ending.last_step,
        "restarts": len(attempts),
        "attempts": [asdict(entry) for entry in (*attempts, ending)],
    }
    write_atomically(path, json.dumps(summary, indent=1) + "\n", before_rename=before_rename)
