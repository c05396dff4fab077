"""Makes files that are not regular, and limits the time of code that opens them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SPECIAL: dict[str, Callable[[Path], None]] = {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}


@contextmanager
def at_once() -> Iterator[None]:
    """Requires that the block takes less than a second of CPU time in this process."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 1.0
