"""The ways a run can end, each with its exit code and whether starting it again makes sense.

Exit codes (the verdicts of a run): 0 done; 75 stopped on request after saving, start me again; 78 wrong configuration;
69 the cluster cannot place the job; 65 bad or damaged data; 70 diverged; 1 anything else.
"""

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1


class MoeDistError(Exception):
    """Base of all errors that a user can cause and mend. Each fault names field, value, rule and the way out.

    Args:
        problems: One fault, or every one that was found, so that one look mends them all.
        see: Page of the docs.
    """

    exit_code: int = EXIT_FAILED
    retry: bool = True  # whether a launcher may start the same command again
    consequence: bool = False  # of an error on another rank, which gives the reason

    def __init__(self, problems: str | Sequence[str], *, see: str | None = None) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        lines = self.problems if len(self.problems) == 1 else [f"{len(self.problems)} faults:", *self.problems]
        super().__init__("\n  - ".join(lines) + (f"\nsee {see}" if see else ""))


class ConfigError(MoeDistError):
    """The configuration cannot run as written."""

    exit_code = 78
    retry = False


class PlacementError(MoeDistError):
    """The ranks, nodes or memory at hand cannot hold what the plan asks for."""

    exit_code = 69
    retry = False


class DataError(MoeDistError):
    """A data file is missing a part, damaged, or disagrees with its manifest."""

    exit_code = 65
    retry = False


class DivergedError(MoeDistError):
    """The loss or the gradients stayed non-finite for too many steps in a row."""

    exit_code = 70
    retry = False


class StoppedError(MoeDistError):
    """The run was asked to stop, saved its state and can go on from there."""

    exit_code = 75
    retry = True


class CheckpointError(MoeDistError):
    """A checkpoint could not be written; the last committed one still stands."""


class StorageError(MoeDistError):
    """A file could not be read or written just now: its disk is full or broken, or its file system is gone."""


class IntegrityError(MoeDistError):
    """What arrived in an exchange between ranks is not what was sent (`parallel.check_exchanges`)."""
