"""Whether a run that ended is started again at once, from its last checkpoint. Pure functions of how its attempts ended."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import (
    EXIT_DONE,
    ConfigError,
    DataError,
    DivergedError,
    MoeDistError,
    PlacementError,
    StoppedError,
)

DEFAULT_MAX_RESTARTS = 3
WITHOUT_GAIN = 2  # attempts in a row that commit no later checkpoint: the fault is there to stay
_KINDS: tuple[type[MoeDistError], ...] = (ConfigError, DataError, DivergedError, PlacementError)
# What would only happen again; and what is no failure.
FINAL = frozenset(kind.exit_code for kind in _KINDS) | {EXIT_DONE, StoppedError.exit_code}


@dataclass(frozen=True)
class Ended:
    """One attempt of a job.

    Attributes:
        code: Its verdict, or the exit code of its ranks where it left none.
        begin, end: Step of the newest committed checkpoint before and after it.
    """

    code: int
    begin: int
    end: int


def committed_step(checkpoints: Path) -> int:
    """Step of the newest committed checkpoint; 0 where there is none, or `latest` cannot be read."""
    try:
        match = re.fullmatch(r"step_(\d+)", (checkpoints / "latest").read_text(errors="replace").strip())
    except OSError:
        return 0
    return int(match[1]) if match else 0


def is_final(code: int) -> bool:
    """Whether a verdict is never followed by a restart: done, stopped on request, or bound to repeat."""
    return code in FINAL


def refusal(attempts: Sequence[Ended], max_restarts: int, *, option: str = "--max-restarts") -> str | None:
    """Why the job is not started again after the last of `attempts`, in words; None where it is.

    Args:
        option: The command's name for `max_restarts`.
    """
    if is_final(attempts[-1].code):
        return "its verdict would only repeat"
    return exhausted(attempts, max_restarts, option=option)


def exhausted(attempts: Sequence[Ended], max_restarts: int, *, option: str = "max_restarts") -> str | None:
    """Why attempts like these are enough, whatever their verdicts: too many, or without gain; None where they are not.

    Args:
        option: As in `refusal`; by default the cluster file's key.
    """
    if len(attempts) > max_restarts:
        return f"it was restarted {max_restarts} times already ({option})" if max_restarts else f"{option}=0"
    last = attempts[-WITHOUT_GAIN:]
    if len(last) == WITHOUT_GAIN and all(each.end <= each.begin for each in last):
        return f"{WITHOUT_GAIN} attempts in a row came no step further than the checkpoint of step {last[-1].end}"
    return None
