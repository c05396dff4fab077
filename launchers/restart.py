"""Decides whether an attempt that ended is restarted from the last checkpoint. Pure functions of the earlier attempts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.regular_file import read_regular
from moe_dist.errors import EXIT_DONE, ConfigError, DataError, DivergedError, ResourceError, StoppedError

DEFAULT_MAX_RESTARTS = 3
WITHOUT_GAIN = 2  # after this many attempts in a row without a new checkpoint, no restart
# Exit codes without a restart: errors that would only repeat, success, and a stop on request.
FINAL = {kind.exit_code for kind in (ConfigError, DataError, DivergedError, ResourceError, StoppedError)} | {EXIT_DONE}


@dataclass(frozen=True)
class AttemptEnd:
    """One attempt that has ended.

    Attributes:
        code: The recorded verdict; without a record, the exit code of the ranks.
        begin, end: Step of the newest committed checkpoint, before and after the attempt.
    """

    code: int
    begin: int
    end: int


def committed_step(checkpoints: Path) -> int:
    """Step of the newest committed checkpoint; 0 without a checkpoint, or if `latest` cannot be read."""
    try:
        match = re.fullmatch(rb"step_(\d{1,18})\s*", read_regular(checkpoints / "latest", most_bytes=64, links=False))
    except OSError:
        return 0
    return int(match[1]) if match else 0  # `latest` may be damaged; the run itself reports that


def is_final(code: int) -> bool:
    """True for an exit code that rules out a restart: success, stopped on request, or an error that would repeat."""
    return code in FINAL


def why_not_restarted(attempts: Sequence[AttemptEnd], max_restarts: int, *, option: str = "max_restarts") -> str | None:
    """The reason against a restart: the limit is reached, or the last attempts committed no later checkpoint. None if the
    job may be restarted. The text names `option`, which sets the limit; by default the key in the cluster file."""
    if len(attempts) > max_restarts:  # the first attempt is no restart
        return f"it was restarted {max_restarts} times already ({option})" if max_restarts else f"{option}=0"
    last = attempts[-WITHOUT_GAIN:]
    if len(last) == WITHOUT_GAIN and all(each.end <= each.begin for each in last):
        return f"{WITHOUT_GAIN} attempts in a row committed no checkpoint after step {last[-1].end}"
    return None
