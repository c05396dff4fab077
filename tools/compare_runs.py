"""Shows the first step at which the metrics.jsonl of two runs differ. Measured times and measurements of the device are
not compared."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.checkpoint.directory import run_path
from moe_dist.errors import ConfigError, DataError, printable
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.command_line import reports_errors, run_command

# Keys that records of earlier versions lack. A key of this list that only one file has is not a difference.
ADDED = frozenset({"ledger.rows_bound", "ledger.rows_padding"})


@dataclass(frozen=True)
class Difference:
    """The first line of metrics.jsonl in which two runs differ.

    Attributes:
        keys: Each entry is (dotted key, value in the first run, value in the second run). None stands for a missing key.
        same: Number of equal lines before this line.
    """

    step: int
    kind: str
    keys: tuple[tuple[str, Any, Any], ...]
    same: int


def first_difference(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], *, rtol: float = 0.0, only: Sequence[str] = ()
) -> tuple[Difference | None, int]:
    """Compares two files line by line. Returns the first difference, and the number of equal lines before it. Lines without
    any compared key are not counted. If one file has more lines, its additional lines are ignored.

    Args:
        rtol: Numbers, also in lists, may differ by this fraction of the larger of the two; 0 compares exactly.
        only: Dotted prefixes of the keys to compare, such as `losses` or `scalars.loss/total`; if empty, compares all keys.
    """
    same = 0
    files = ((line for line in file if line.get("kind") != "hint") for file in (first, second))  # some depend on times
    for one, other in zip(*files, strict=False):  # ignores the additional lines of the longer file
        part = _part(one, only)
        keys = tuple(_differing(part, _part(other, only), rtol))
        if (one["step"], one.get("kind")) != (other["step"], other.get("kind")):
            keys = (("step", one["step"], other["step"]), ("kind", one.get("kind"), other.get("kind")))
        if keys:
            return Difference(one["step"], str(one.get("kind")), keys, same), same
        same += bool(part)
    return None, same


def _part(line: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    leaves = dict(_leaves(reproducible_part(line)))
    wanted = tuple(f"{prefix}." for prefix in only) or ("",)
    return {key: value for key, value in leaves.items() if f"{key}.".startswith(wanted)}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], rtol: float) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*one, *other]):
        if key in ADDED and not (key in one and key in other):
            continue
        a, b = one.get(key), other.get(key)
        if not (key in one and key in other and (a == b or _close(a, b, rtol))):
            yield key, a, b


def _close(a: Any, b: Any, rtol: float) -> bool:
    if isinstance(a, list):
        same = isinstance(b, list) and len(a) == len(b)
        return same and all(_close(one, other, rtol) for one, other in zip(a, b, strict=True))
    numbers = isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool)
    try:
        return numbers and math.isclose(a, b, rel_tol=rtol, abs_tol=0.0)
    except OverflowError:  # an integer beyond float64, which cannot equal the other number
        return False


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each leaf of a nested mapping as (dotted key, value). A list of numbers counts as one value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(each, list | Mapping) for each in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}.{number}")
    else:
        yield prefix, value


RECORD = "metrics.jsonl"
SHOWN = 20


@reports_errors("compare_runs")
def main(
    first: Annotated[Path, typer.Argument(help="A run folder, or its metrics.jsonl.")],
    second: Annotated[Path, typer.Argument(help="Another run folder, or its metrics.jsonl.")],
    rtol: Annotated[float, typer.Option(min=0.0, help="Relative difference up to which numbers count as equal.")] = 0.0,
    only: Annotated[list[str], typer.Option(help="Compare only keys under this one, as losses; may be repeated.")] = [],  # noqa: B006
) -> None:
    """Find the first step at which two runs differ. Ends with exit code 0 without a difference, and with 1 otherwise."""
    try:
        lines = [read_lines(_record(path)) for path in (first, second)]
        difference, same = first_difference(*lines, rtol=rtol, only=only)
    except ValueError as error:
        raise DataError(str(error)) from error
    if difference is None and not same:
        raise DataError(
            f"{first} and {second}: no line of both can be compared; give two runs with records, or another --only"
        )
    if difference is None:
        print(f"{same} lines, no difference")
        return
    place = f"step {difference.step}, {difference.kind}"
    print(printable(f"first difference: {place}; the {difference.same} lines before it are equal"))
    for key, one, other in difference.keys[:SHOWN]:
        print(printable(f"  {key}: {one!r:.60} and {other!r:.60}"))
    if len(difference.keys) > SHOWN:
        print(f"  and {len(difference.keys) - SHOWN} more keys")
    raise typer.Exit(1)


def _record(path: Path) -> Path:
    path = run_path(path)
    found = path / RECORD if path.is_dir() else path
    if not found.is_file():
        raise ConfigError(f"{found} is not there; give a run folder (runs/<name>) or its {RECORD}")
    return found


if __name__ == "__main__":
    run_command(main)
