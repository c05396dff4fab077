"""Which cases of a product `make test` runs: a small cover of all values. `make test-full` runs every case."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest

from tests.support.layouts import Layout

MOST_RANKS = 4  # eight processes that import torch take half a minute of two cores


def others_full(cases: Sequence[Any], pairs_of: Sequence[str] = ()) -> list[Any]:
    """The cases, with those outside of a greedy cover marked `full`.

    Args:
        cases: Layouts, or tuples that begin with one.
        pairs_of: Fields of which the cover has every pair of values. Of all other fields it has every value.
    """
    traits = {position: set(_traits(_layout_of(case), pairs_of)) for position, case in enumerate(cases)}
    small = [position for position, case in enumerate(cases) if _layout_of(case).world_size <= MOST_RANKS]
    missing, cover = set().union(*(traits[position] for position in small)), set()
    while missing:
        best = max(small, key=lambda position: (len(traits[position] & missing), -_layout_of(cases[position]).world_size))
        cover.add(best)
        missing -= traits[best]
    return [
        case if position in cover else full(*(case if isinstance(case, tuple) else (case,)))
        for position, case in enumerate(cases)
    ]


def _layout_of(case: Any) -> Layout:
    return case if isinstance(case, Layout) else case[0]


def full(*case: Any) -> Any:
    """A case that `make test` leaves out."""
    return pytest.param(*case, marks=pytest.mark.full)


def _traits(layout: Layout, pairs_of: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    for field in fields(layout):
        yield field.name, getattr(layout, field.name)
    for pair in combinations(pairs_of, 2):
        yield *pair, *(getattr(layout, name) for name in pair)
