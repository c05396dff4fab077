"""Writes the log of a rank, whose lines begin with rank and step, and messages about a slow start.

moe_dist's launchers redirect a rank's standard error to the file log/rank_R.log. Log lines therefore go to:

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

from moe_dist.errors import LONGEST, printable
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.secrets import without_secrets

QUIET_SECONDS = 10.0


class WithoutSecrets(logging.Formatter):
    """Removes secrets of the environment, and control characters, from log lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_secrets(super().format(record), os.environ), most=50 * LONGEST)


class StepPrefix(logging.Filter):
    """Adds the field `place` to each record: '3 @120' for rank 3 in step 120, or only '3' before `follow` is called."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._step: Callable[[], int] | None = None

    def follow(self, step: Callable[[], int]) -> None:
        """Makes all later log lines show the step number that the function `step` returns."""
        self._step = step

    def filter(self, record: logging.LogRecord) -> bool:
        record.place = f"{self._rank} @{self._step()}" if self._step is not None else str(self._rank)
        return True


def setup_logging(env: RankEnv, folder: RunFolder) -> StepPrefix:
    """Configures the root logger, and replaces the handlers of an earlier call. To show steps in log lines, call `follow`
    of the returned object. The lowest logged level is INFO for moe_dist and WARNING for libraries."""
    root, prefix = logging.getLogger(), StepPrefix(env.rank)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()  # otherwise each call would leak an open log file
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if env.launched and env.rank > 0 else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if not env.launched or env.rank == 0:
        folder.logs.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder.log_of(env.rank), encoding="utf-8")
        file.setLevel(logging.INFO)
        if env.launched:  # the launcher already copies warnings from standard error into this file
            file.addFilter(lambda record: record.levelno < logging.WARNING)
        handlers.append(file)
    for handler in handlers:
        handler.addFilter(prefix)
        handler.setFormatter(WithoutSecrets("%(asctime)s [%(place)s] %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)  # libraries log only warnings and errors
    logging.getLogger("moe_dist").setLevel(logging.INFO)
    return prefix


class Startup:
    """A thread that prints a starting run's current action every `quiet_seconds`, because importing torch or reading data
    can take minutes. If it has printed anything, `done` prints that the start is over. Enable it only on rank 0."""

    def __init__(self, *, enabled: bool, quiet_seconds: float = QUIET_SECONDS, stream: TextIO | None = None) -> None:
        self._quiet_seconds, self._stream = quiet_seconds, stream or sys.stderr
        self._doing, self._began = "", time.monotonic()
        self._done = threading.Event()
        if enabled:
            threading.Thread(target=self._tell, name="startup", daemon=True).start()

    def now(self, doing: str) -> None:
        """Sets the current action of the main thread, such as 'importing torch'."""
        self._doing = doing

    def done(self) -> None:
        """Ends the output; a second call does nothing."""
        self._done.set()

    def _tell(self) -> None:
        told = over = False
        while not over:
            over = self._done.wait(self._quiet_seconds)
            seconds = time.monotonic() - self._began
            if told or not over:  # the last line must not say that the run is still starting
                text = f"started after {seconds:.0f} s" if over else f"still starting after {seconds:.0f} s: {self._doing}"
                self._stream.write(f"{text}\n")
                self._stream.flush()  # because a pipe is block-buffered
            told = True
