"""Chooses which cases of a product each make target runs.

`make test` runs a small cover of all values of layouts, and `make test-full` runs a cover of all pairs of values. If
layouts are not the subject of a test, `make test` runs only the few cases that switch on the most options, and
`make test-full` runs the cover of all values. `make test-exhaustive` runs every case.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest

from tests.support.layouts import Layout

MOST_RANKS = 4  # eight processes that import torch occupy two cores for half a minute


def others_full(cases: Sequence[Any], keep: int | None = None) -> list[Any]:
    """Returns cases (layouts, or tuples that begin with a layout). Cases outside of a greedy cover of all values of each
    field are marked: as `full` if they are in a cover of all pairs of values, otherwise as `exhaustive`.

    Args:
        keep: Number of cases of the greedy cover that stay unmarked. Each of them switches on as many options as possible
            that the cases before it leave off. The cover's other cases are marked as `full`, and cases outside of the cover
            as `exhaustive`. Only test_n_ranks_equal_one.py gives no number, because layouts are its subject.
    """
    small = [position for position, case in enumerate(cases) if _layout_of(case).world_size <= MOST_RANKS]
    cover = _cover(cases, small, pairs=False)
    larger = cover if keep is not None else _cover(cases, range(len(cases)), pairs=True, begun=cover)
    kept = cover if keep is None else _most_telling(cases, cover, keep)
    return [
        case
        if position in kept
        else (full if position in larger else exhaustive)(*(case if isinstance(case, tuple) else (case,)))
        for position, case in enumerate(cases)
    ]


def _most_telling(cases: Sequence[Any], among: Iterable[int], keep: int) -> set[int]:
    traits = {position: set(_traits(_layout_of(cases[position]), pairs=False)) for position in sorted(among)}
    had = set(_traits(Layout(), pairs=False))
    kept: set[int] = set()
    for _ in range(min(keep, len(traits))):
        best = max(traits.keys() - kept, key=lambda position: (len(traits[position] - had), -position))
        kept.add(best)
        had |= traits[best]
    return kept


def _cover(cases: Sequence[Any], among: Iterable[int], *, pairs: bool, begun: Iterable[int] = ()) -> set[int]:
    traits = {position: set(_traits(_layout_of(cases[position]), pairs)) for position in among}
    cover = set(begun)
    missing = set().union(*traits.values()).difference(*(traits[position] for position in cover))
    while missing:
        best = max(traits, key=lambda position: (len(traits[position] & missing), -_layout_of(cases[position]).world_size))
        cover.add(best)
        missing -= traits[best]
    return cover


def _layout_of(case: Any) -> Layout:
    return case if isinstance(case, Layout) else case[0]


def full(*case: Any) -> Any:
    """Marks a case that `make test` leaves out."""
    return pytest.param(*case, marks=pytest.mark.full)


def rest_full(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """Returns the cases, each a single value; those after the first `keep` are marked `full`."""
    return [case if position < keep else full(case) for position, case in enumerate(cases)]


def full_unless(keep: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Returns the cases of a product; those for which `keep(*values)` is false are marked `full`."""
    return [case if keep(*case) else full(*case) for case in cases]


def exhaustive(*case: Any) -> Any:
    """Marks a case that `make test-full` leaves out as well."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def _traits(layout: Layout, pairs: bool) -> Iterator[tuple[Any, ...]]:
    values = [(field.name, getattr(layout, field.name)) for field in fields(layout)]
    return combinations(values, 2 if pairs else 1)
