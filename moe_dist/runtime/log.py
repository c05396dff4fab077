"""Logging of one rank; each line shows rank and step.

The launchers already send standard error into log/rank_R.log. Therefore:

    launched, rank 0     warnings to standard error (terminal and file), the rest to the file
    launched, others     everything to standard error, which is the file
    not launched         warnings to standard error, everything to the file
"""

import logging
import os
import sys
from collections.abc import Callable

from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.secrets import without_secrets


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
