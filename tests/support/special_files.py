"""Files that are no regular files, and a bound on the time of what meets them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SPECIAL: dict[str, Callable[[Path], None]] = {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}


@contextmanager
def at_once() -> Iterator[None]:
    """The block takes less than a second of this process's time."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 1.0
