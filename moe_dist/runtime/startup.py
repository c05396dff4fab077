"""Prints what a starting run is doing: importing torch or reading data can take minutes."""

import sys
import threading
import time
from typing import TextIO

QUIET_SECONDS = 10.0


class Startup:
    """Prints a line at intervals from a thread, until `done`.

    Args:
        enabled: True on rank 0 only.
        quiet_seconds: Interval between lines.
        stream: Output; default standard error.
    """

    def __init__(self, *, enabled: bool, quiet_seconds: float = QUIET_SECONDS, stream: TextIO | None = None) -> None:
        self._quiet_seconds, self._stream = quiet_seconds, stream or sys.stderr
        self._doing, self._began = "", time.monotonic()
        self._done = threading.Event()
        if enabled:
            threading.Thread(target=self._tell, name="startup", daemon=True).start()

    def now(self, doing: str) -> None:
        """Sets what the main thread does now, as 'importing torch'."""
        self._doing = doing

    def done(self) -> None:
        """Ends the output; a second call does nothing."""
        self._done.set()

    def _tell(self) -> None:
        while not self._done.wait(self._quiet_seconds):
            self._stream.write(f"still starting after {time.monotonic() - self._began:.0f} s: {self._doing}\n")
            self._stream.flush()  # a pipe is block-buffered
