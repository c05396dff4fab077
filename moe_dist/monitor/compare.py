"""Compares the records of two runs and finds the first reproducible line that differs. No torch."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from moe_dist.monitor.tags import reproducible_part


@dataclass(frozen=True)
class Parting:
    """The first difference.

    Attributes:
        step, kind: Of the line that differs.
        keys: (dotted key, value in the first, value in the second); a value is None where the record lacks the key.
        same: Number of equal lines before it.
    """

    step: int
    kind: str
    keys: tuple[tuple[str, Any, Any], ...]
    same: int


def first_difference(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], *, rtol: float = 0.0, only: Sequence[str] = ()
) -> tuple[Parting | None, int]:
    """The first line that differs, and the number of lines compared. Only lines that both records have are compared: an
    earlier end is no difference.

    Args:
        first, second: Lines of two metrics.jsonl in order.
        rtol: Numbers differ if they are further apart than this, relative to the larger; 0 compares bits.
        only: Dotted prefixes of the keys to compare, such as `losses` or `scalars.loss/total`; empty for all.
    """
    same = 0
    for one, other in zip_longest(first, second):
        if one is None or other is None:
            break
        keys = tuple(_differing(_part(one, only), _part(other, only), rtol))
        if (one["step"], one.get("kind")) != (other["step"], other.get("kind")):
            keys = (("step", one["step"], other["step"]), ("kind", one.get("kind"), other.get("kind")))
        if keys:
            return Parting(one["step"], str(one.get("kind")), keys, same), same
        same += 1
    return None, same


def _part(line: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    leaves = dict(_leaves(reproducible_part({"scalars": {}, **line})))
    if not only:
        return leaves
    return {key: value for key, value in leaves.items() if any(key == each or key.startswith(f"{each}.") for each in only)}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], rtol: float) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if key in one and key in other and (a == b or _close(a, b, rtol)):
            continue
        yield key, a, b


def _close(a: Any, b: Any, rtol: float) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and not isinstance(a, bool) and math.isclose(a, b, rel_tol=rtol, abs_tol=0.0)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(each, list | Mapping) for each in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}.{number}")
    else:
        yield prefix, value
