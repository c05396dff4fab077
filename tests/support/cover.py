"""Which cases of a product run when.

`make test` runs a small cover of all values of layouts, or the few of its cases that switch on most, where the layouts are
not what the test is about; `make test-full` runs a cover of all pairs of values, or of all values where the layouts are not
what the test is about; `make test-exhaustive` runs every case.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest

from tests.support.layouts import Layout

MOST_RANKS = 4  # eight processes that import torch take half a minute of two cores


def others_full(cases: Sequence[Any], keep: int | None = None) -> list[Any]:
    """The cases, layouts or tuples that begin with one, with marks on those outside of a greedy cover of all values of each
    field: `full` on those of a cover of all pairs of values, `exhaustive` on the rest.

    Args:
        keep: Number of cases of the first cover that are not marked; its others are marked `full`, and all outside of it
            `exhaustive`. Each kept one switches on most of what the earlier ones leave off. test_n_ranks_equal_one.py gives
            no number: it has all values of layouts and all pairs of values.
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
    """A case that `make test` leaves out."""
    return pytest.param(*case, marks=pytest.mark.full)


def rest_full(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """The cases, each a single value, with those after the first `keep` marked `full`."""
    return [case if position < keep else full(case) for position, case in enumerate(cases)]


def full_unless(keep: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The cases of a product, with those marked `full` for which `keep`, called with their values, is false."""
    return [case if keep(*case) else full(*case) for case in cases]


def exhaustive(*case: Any) -> Any:
    """A case that `make test-full` leaves out as well."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def _traits(layout: Layout, pairs: bool) -> Iterator[tuple[Any, ...]]:
    values = [(field.name, getattr(layout, field.name)) for field in fields(layout)]
    return combinations(values, 2 if pairs else 1)
