"""Measured time of a run's checkpoint saves, for comparison with a scheduler's grace period."""

import contextlib
import re
from pathlib import Path

from moe_dist.runtime.tail import lines_from_end

LOOKED_AT = 4 << 20  # bytes read from the end of the log
SAVES = 5
_DURABLE = re.compile(rb"checkpoint step_\d+: durable after ([0-9.]+) s")


def measured_save_seconds(logs: Path) -> float | None:
    """Seconds of the longest of the last SAVES saves, from the log of rank 0; None without a save or a readable log.

    Args:
        logs: The log folder of a run.
    """
    found: list[float] = []
    with contextlib.suppress(OSError):  # an unreadable log only means that the time is unknown
        for line in lines_from_end(logs / "rank_0.log", most_bytes=LOOKED_AT):
            if match := _DURABLE.search(line):
                found.append(float(match[1]))
            if len(found) == SAVES:  # recent saves only: the size may have changed
                break
    return max(found, default=None)
