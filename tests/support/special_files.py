"""Makes files that are not regular, and limits the bytes that code reads from them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SPECIAL: dict[str, Callable[[Path], None]] = {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}


@contextmanager
def reads_little() -> Iterator[None]:
    """Requires that this process reads at most 1 GiB within the block."""
    began = _bytes_read()
    yield
    assert _bytes_read() - began <= 1 << 30


def _bytes_read() -> int:
    """Returns how many bytes this process got from `read` calls, also from the page cache (rchar in proc_pid_io(5))."""
    return int(Path("/proc/self/io").read_text().split()[1])
