"""Waits for other processes or threads, and tells whether a process runs."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Waits until `condition` holds; fails after ten minutes, which means a hang."""
    deadline = time.monotonic() + 600.0
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Returns whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
