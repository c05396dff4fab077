"""What a check found: one line each, with the way out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, DataError, MoeDistError, PlacementError


class Level(IntEnum):
    """How bad it is, from nothing to an end."""

    OK = 0
    NOTE = 1  # could not be checked, or has nothing to be held against; nothing is wrong
    WARNING = 2  # the run would start, and go worse for it
    ERROR = 3  # the run would end with the finding's verdict


@dataclass(frozen=True)
class CheckResult:
    """One line.

    Attributes:
        check: What was looked at, as 'shared folder'.
        level: How bad it is.
        text: What is there; of a fault with field, value and rule.
        fix: What to do about it; of warnings and errors.
        verdict: That the run would end with; of errors.
    """

    check: str
    level: Level
    text: str
    fix: str = ""
    verdict: int = EXIT_DONE

    def __str__(self) -> str:
        return f"{self.check}: {self.text}" + (f"; {self.fix}" if self.fix else "")

    @property
    def is_problem(self) -> bool:
        return self.level >= Level.WARNING


def ok(check: str, text: str) -> CheckResult:
    """Nothing is wrong there."""
    return CheckResult(check, Level.OK, text)


def note(check: str, text: str) -> CheckResult:
    """Nothing to judge."""
    return CheckResult(check, Level.NOTE, text)


def warning(check: str, text: str, fix: str) -> CheckResult:
    """The run would start, and go worse for it."""
    return CheckResult(check, Level.WARNING, text, fix)


def error(check: str, text: str, fix: str, *, kind: type[MoeDistError] = PlacementError) -> CheckResult:
    """The run would end, with the verdict of `kind`."""
    return CheckResult(check, Level.ERROR, text, fix, kind.exit_code)


_WORST_FIRST = (ConfigError.exit_code, DataError.exit_code, PlacementError.exit_code)


def exit_code(findings: Iterable[CheckResult]) -> int:
    """The worst of all: of errors 78, 65 or 69, the first of these that is among them; 1 where there are warnings alone; 0
    where nothing is wrong."""
    problems = [finding for finding in findings if finding.is_problem]
    verdicts = {problem.verdict for problem in problems if problem.level is Level.ERROR}
    worst = [code for code in (*_WORST_FIRST, *sorted(verdicts)) if code in verdicts]
    return worst[0] if worst else EXIT_FAILED if problems else EXIT_DONE


def raise_errors(findings: Sequence[CheckResult]) -> None:
    """Ends a run that cannot go on here.

    Raises:
        ConfigError, DataError, PlacementError: with every error, of the kind that `exit_code` gives.
    """
    errors = [finding for finding in findings if finding.level is Level.ERROR]
    if errors:
        kinds: dict[int, type[MoeDistError]] = {kind.exit_code: kind for kind in (ConfigError, DataError, PlacementError)}
        raise kinds[exit_code(errors)]([str(finding) for finding in errors], see="docs/scaling.md")


def names(nodes: Sequence[str], *, most: int = 6) -> str:
    """Nodes in a sentence: 'node3', 'node1 and node2', 'node1, node2, ... (64 nodes)'."""
    if len(nodes) > most:
        return f"{', '.join(nodes[:most])}, ... ({len(nodes)} nodes)"
    return " and ".join([", ".join(nodes[:-1]), nodes[-1]]) if len(nodes) > 1 else "".join(nodes)
