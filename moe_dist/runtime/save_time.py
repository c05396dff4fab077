"""How long a run's last checkpoints took to write: a stop must wait that long, so the scheduler's grace must allow it."""

import contextlib
import json
from pathlib import Path

from moe_dist.runtime.files import write_atomically

FILE = "save_seconds.json"  # in the log folder of a run
SAVES = 5


def record_save_seconds(logs: Path, seconds: float) -> None:
    """Notes one save, from its beginning until it was durable, beside the last few. For rank 0.

    A full disk is not reported here: whoever writes the next record meets it too.
    """
    with contextlib.suppress(OSError):
        write_atomically(logs / FILE, json.dumps([*_read(logs), seconds][-SAVES:]) + "\n")


def measured_save_seconds(logs: Path) -> float | None:
    """The longest of the last few saves; None before the first, or where the file cannot be read."""
    return max(_read(logs), default=None)


def _read(logs: Path) -> list[float]:
    try:
        found = json.loads((logs / FILE).read_text())
    except (OSError, ValueError):
        return []
    return [float(each) for each in found if isinstance(each, int | float)] if isinstance(found, list) else []
