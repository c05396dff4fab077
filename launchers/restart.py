"""Decides whether a run is restarted from the last checkpoint after an attempt. The local, Slurm and Ray launchers share
this rule. All functions are pure and get the earlier attempts as arguments."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.regular_file import read_regular
from moe_dist.errors import EXIT_DONE, ConfigError, DataError, DivergedError, ResourceError, StoppedError

WITHOUT_GAIN = 2  # there is no restart after this many consecutive failures without progress (`AttemptEnd.fruitless`)
STOPPED = StoppedError.exit_code
# Exit codes after which a run is not restarted: errors that would only repeat, success, and a stop on request.
FINAL = {kind.exit_code for kind in (ConfigError, DataError, DivergedError, ResourceError, StoppedError)} | {EXIT_DONE}


@dataclass(frozen=True)
class AttemptEnd:
    """One attempt (start of the run), ended or running.

    Attributes:
        code: The recorded verdict; without a record, the exit code of the ranks. None while the attempt runs.
        begin, end: Step of the newest committed checkpoint, before and after the attempt; equal while the attempt runs.
        asked: True if somebody asked the attempt to stop: a preemption, a time limit, a requeue, or the user.
    """

    code: int | None
    begin: int
    end: int
    asked: bool = False

    @property
    def fruitless(self) -> bool:
        """True if the attempt committed no later checkpoint."""
        return self.end <= self.begin


def committed_step(checkpoints: Path) -> int:
    """Returns the step of the newest committed checkpoint; 0 if there is none, or if `latest` cannot be read."""
    try:
        match = re.fullmatch(rb"step_(\d{1,18})\s*", read_regular(checkpoints / "latest", most_bytes=64, links=False))
    except OSError:
        return 0
    return int(match[1]) if match else 0  # `latest` may be damaged; the run itself reports the damage


def is_final(code: int) -> bool:
    """Returns whether an exit code rules out a restart: success, stopped on request, or an error that would repeat."""
    return code in FINAL


def why_not_restarted(attempts: Sequence[AttemptEnd], max_restarts: int, *, option: str = "max_restarts") -> str | None:
    """Returns the reason against a restart: the limit is reached, or the last failures were fruitless. Returns None if the
    job may be restarted. Every restart of the job counts towards the limit, whatever its reason. The message names
    `option`, which sets the limit; the default is the key in the cluster file."""
    if len(attempts) > max_restarts:  # the first attempt is not a restart
        return f"it was restarted {max_restarts} times already ({option})" if max_restarts else f"{option}=0"
    # A requested stop without a new checkpoint does not count as a failure, because the attempt may just have started.
    failures = [each for each in attempts if not (each.fruitless and (each.asked or each.code == STOPPED))]
    last = failures[-WITHOUT_GAIN:]
    if len(last) == WITHOUT_GAIN and all(each.fruitless for each in last):
        return f"{WITHOUT_GAIN} failed attempts in a row committed no checkpoint after step {last[-1].end}"
    return None
