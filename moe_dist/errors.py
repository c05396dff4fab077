"""The exceptions that end a run, with their exit codes.

The exit codes mean: 0 done; 75 stopped on request after saving a checkpoint (the same command resumes the run); 78 invalid
configuration; 69 the cluster lacks nodes or memory; 65 invalid or damaged data; 70 diverged; 1 any other error.
"""

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
MOST_LINES = 40  # largest number of lines of an error's text
LONGEST = 20_000  # largest number of characters of a message that is printed or recorded


def printable(text: str, *, most: int = LONGEST) -> str:
    """Returns the first `most` characters of a text in a form that is safe to print. Control characters other than tabs and
    line ends become escapes, because file names of other users may contain terminal commands."""
    cut = f" ... ({len(text) - most:,} more characters)" if len(text) > most else ""
    if (text := text[:most]).isprintable():
        return text + cut
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text) + cut


class MoeDistError(Exception):
    """The base class of all errors that a user can cause and fix.

    Args:
        problems: One problem, or all problems found. Each problem names the field, its value, the rule and the fix.
        see: Page of the docs that explains the problems.
    """

    exit_code: int = EXIT_FAILED
    retry: bool = True  # True if a launcher may start the same command again
    consequence: bool = False  # True if this error follows from an error on another rank, which reports the cause

    def __init__(self, problems: str | Sequence[str], *, see: str | None = None) -> None:
        self.problems = tuple(map(printable, (problems,) if isinstance(problems, str) else problems))
        lines = self.problems if len(self.problems) == 1 else [f"{len(self.problems)} problems:", *self.problems]
        shown = "\n  - ".join(lines).split("\n")
        if len(shown) > MOST_LINES:
            shown[MOST_LINES - 1 :] = [f"  ... and {len(shown) - MOST_LINES + 1} more lines"]
        super().__init__(printable("\n".join(shown)) + (f"\nsee {see}" if see else ""))


class ConfigError(MoeDistError):
    """The configuration is invalid."""

    exit_code = 78
    retry = False


class ResourceError(MoeDistError):
    """The run needs more ranks, nodes or memory than are available."""

    exit_code = 69
    retry = False


class PlacementError(ResourceError):
    """A rank runs on a node that differs from the node that the run's plan assigned to this rank."""


class DataError(MoeDistError):
    """A data file is incomplete, damaged, or disagrees with its manifest."""

    exit_code = 65
    retry = False


class DivergedError(MoeDistError):
    """The loss or the gradients were not finite in too many consecutive steps."""

    exit_code = 70
    retry = False


class StoppedError(MoeDistError):
    """The run got a stop signal. The run can be resumed from its last checkpoint."""

    exit_code = 75


class CheckpointError(MoeDistError):
    """A checkpoint could not be written. The last committed checkpoint is intact."""


class StorageError(MoeDistError):
    """A file cannot be read or written now: the disk is full or failing, or the file system is lost."""


class IntegrityError(MoeDistError):
    """Copies of weights that must be equal on several ranks differ (`monitor.compare_copies_every`)."""
