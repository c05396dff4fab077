"""How long a run's checkpoints took to write: what a stop has to wait for, to be held against the grace of a scheduler."""

import contextlib
import re
from pathlib import Path

from moe_dist.runtime.tail import lines_from_end

LOOKED_AT = 4 << 20  # bytes of the log's end
SAVES = 5
_DURABLE = re.compile(rb"checkpoint step_\d+: durable after ([0-9.]+) s")


def measured_save_seconds(logs: Path) -> float | None:
    """The longest of the last few saves, from the log of rank 0; None before the first, or where the log cannot be read.

    Args:
        logs: The log folder of a run.
    """
    found: list[float] = []
    with contextlib.suppress(OSError):  # whether a run can be written to is not for those to say who only want this number
        for line in lines_from_end(logs / "rank_0.log", most_bytes=LOOKED_AT):
            if match := _DURABLE.search(line):
                found.append(float(match[1]))
            if len(found) == SAVES:
                break
    return max(found, default=None)
