"""Chooses the cases of a product that each make target runs.

make test             a small cover of all values of the layouts; where layouts are not the subject, a few cases that
                      switch on most options
make test-full        a cover of all pairs of values; where layouts are not the subject, of all values
make test-exhaustive  every case
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest

from tests.support.layouts import Layout

MOST_RANKS = 4  # eight processes that import torch take half a minute on two cores


def others_full(cases: Sequence[Any], keep: int | None = None) -> list[Any]:
    """Marks the cases (layouts, or tuples that begin with one) outside of a greedy cover of all values of each field. Cases
    of a cover of all pairs are marked `full`, the rest `exhaustive`.

    Args:
        keep: Number of unmarked cases. Each adds most options to the earlier ones. The rest of the cover of all values is
            then marked `full`, and all other cases `exhaustive`. test_n_ranks_equal_one.py gives no number, and so has all
            values of layouts and all pairs of values.
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


def full_with_each_version(*case: Any) -> Any:
    """Marks a case that `make test` leaves out, and that `make test-full` runs with each version of megatron-core. Only
    these cases run with the next version."""
    return pytest.param(*case, marks=pytest.mark.full("with each version"))


def rest_full(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """Marks all single-value cases after the first `keep` as `full`."""
    return [case if position < keep else full(case) for position, case in enumerate(cases)]


def full_unless(keep: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Marks the cases of a product as `full` for whose values `keep` returns false."""
    return [case if keep(*case) else full(*case) for case in cases]


def rest_exhaustive(cases: Iterable[Any]) -> list[Any]:
    """Marks all single-value cases after the first as `exhaustive`."""
    return [exhaustive(case) if position else case for position, case in enumerate(cases)]


def exhaustive(*case: Any) -> Any:
    """Marks a case that `make test-full` also leaves out."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def _traits(layout: Layout, pairs: bool) -> Iterator[tuple[Any, ...]]:
    values = [(field.name, getattr(layout, field.name)) for field in fields(layout)]
    return combinations(values, 2 if pairs else 1)
