"""The result of one check. It is printed as one line that includes the fix."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, DataError, MoeDistError, ResourceError


class Level(IntEnum):
    """The severity of a check's result."""

    OK = 0
    NOTE = 1  # the check could not be made
    WARNING = 2  # the run would start, but with a problem
    ERROR = 3  # the run would end, with the exit code `verdict`


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        check: Name of the check, such as 'shared folder'.
        text: The state that the check observed. If it is a problem, the text names the field, its value and the rule.
        fix: How to fix the warning or error.
        verdict: Exit code with which the error would end the run.
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
    """Returns the result of a check that found no problem."""
    return CheckResult(check, Level.OK, text)


def note(check: str, text: str) -> CheckResult:
    """Returns the result of a check that could not be made."""
    return CheckResult(check, Level.NOTE, text)


def warning(check: str, text: str, fix: str) -> CheckResult:
    """Returns the result of a check with a problem that would not stop the run."""
    return CheckResult(check, Level.WARNING, text, fix)


def error(check: str, text: str, fix: str, *, kind: type[MoeDistError] = ResourceError) -> CheckResult:
    """Returns the result of a check with a problem that would end the run with the exit code of `kind`."""
    return CheckResult(check, Level.ERROR, text, fix, kind.exit_code)


# Maps exit codes to error classes, in the order in which a user must fix the errors.
_KINDS: dict[int, type[MoeDistError]] = {kind.exit_code: kind for kind in (ConfigError, DataError, ResourceError)}


def exit_code(results: Iterable[CheckResult]) -> int:
    """Returns one exit code for all results: the first of 78, 65 and 69 that any error has. If there are only warnings,
    returns 1, and otherwise 0."""
    problems = [result for result in results if result.is_problem]
    verdicts = {problem.verdict for problem in problems if problem.level is Level.ERROR}
    worst = [code for code in (*_KINDS, *sorted(verdicts)) if code in verdicts]
    return worst[0] if worst else EXIT_FAILED if problems else EXIT_DONE


def raise_errors(results: Sequence[CheckResult]) -> None:
    """Raises all errors among the results together, as one ConfigError, DataError or ResourceError (see `exit_code`)."""
    if errors := [result for result in results if result.level is Level.ERROR]:
        raise _KINDS[exit_code(errors)]([str(result) for result in errors], see="docs/scaling.md")


def names(nodes: Sequence[str], *, most: int = 6) -> str:
    """Returns a phrase with node names: 'node3', 'node1 and node2', or 'node1, node2, ... (64 nodes)'."""
    if len(nodes) > most:
        return f"{', '.join(nodes[:most])}, ... ({len(nodes)} nodes)"
    return " and ".join([", ".join(nodes[:-1]), nodes[-1]]) if len(nodes) > 1 else "".join(nodes)
