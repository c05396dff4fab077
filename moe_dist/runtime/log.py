"""Logging of one rank; each line shows rank and step. And what a starting run is doing.

The launchers already send standard error into log/rank_R.log. Therefore:

    launched, rank 0     warnings to standard error (terminal and file), the rest to the file
    launched, others     everything to standard error, which is the file
    not launched         warnings to standard error, everything to the file
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.secrets import without_secrets

QUIET_SECONDS = 10.0


class WithoutSecrets(logging.Formatter):
    """Removes secrets of the environment from log lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record), os.environ)


class StepPrefix(logging.Filter):
    """Adds `place`, as '3 @120' for rank 3 in step 120, to each record."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._step: Callable[[], int] | None = None

    def follow(self, step: Callable[[], int]) -> None:
        """Shows this step in all later lines."""
        self._step = step

    def filter(self, record: logging.LogRecord) -> bool:
        record.place = f"{self._rank} @{self._step()}" if self._step is not None else str(self._rank)
        return True


def setup_logging(env: RankEnv, folder: RunFolder, *, level: int = logging.INFO) -> StepPrefix:
    """Configures the root logger; replaces the handlers of an earlier call.

    Args:
        folder: The run folder; its log folder is created if it is missing.
        level: Lowest level for moe_dist; for libraries it is WARNING.

    Returns:
        The prefix; call its `follow` to show steps.
    """
    root, prefix = logging.getLogger(), StepPrefix(env.rank)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()  # otherwise each call would leak an open log file
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level if env.launched and env.rank > 0 else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if not env.launched or env.rank == 0:
        folder.logs.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder.log_of(env.rank), encoding="utf-8")
        file.setLevel(level)
        if env.launched:  # the launcher copies warnings from standard error into this file
            file.addFilter(lambda record: record.levelno < logging.WARNING)
        handlers.append(file)
    for handler in handlers:
        handler.addFilter(prefix)
        handler.setFormatter(WithoutSecrets("%(asctime)s [%(place)s] %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)  # libraries are quiet
    logging.getLogger("moe_dist").setLevel(level)
    return prefix


class Startup:
    """Prints at intervals, from a thread, what a starting run is doing, until `done`: importing torch or reading data can
    take minutes.

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
