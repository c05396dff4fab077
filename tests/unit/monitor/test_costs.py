"""The cost table multiplies each method's rows by the bytes of a row, and leaves out lines that do not apply."""

from typing import Any

import pytest

from moe_dist.monitor.costs import CostTable, cost_table
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

GROUPS = (ExpertGroup("text", 4, 4, 2, 8), ExpertGroup("image", 4, 4, 2, 8, first_expert=4))
PINNED = ExpertPlacement(GROUPS, ((0, 1, 2, 3), (4, 5, 6, 7)))


def ledger(rows: int) -> dict[str, int]:
    found = dict.fromkeys(("rows_padding", "pairs"), 0) | {"rows_remote": rows, "payload_bytes": 40 * rows}
    return found | {"rows_per_pair": 2 * rows, "rows_same_active": 3 * rows, "rows_topk": 4 * rows}


def costs_of(rows: list[int], placement: ExpertPlacement, counted: dict[str, int], untimed: str = "") -> CostTable:
    options: dict[str, Any] = {"tokens": 50, "seconds": "0.250", "untimed": untimed}
    return cost_table([ledger(each) for each in rows], placement, "pinned", counted, **options)


def table(placement: ExpertPlacement = PINNED, own: int = 400, untimed: str = "") -> CostTable:
    return costs_of([100, 300], placement, {"pinned": own, "interleaved": 600}, untimed)


def test_each_method_has_its_rows_times_the_bytes_of_a_row() -> None:
    found = table()
    assert (found.steps, found.tokens) == (2, 50)
    assert [(cost.method, cost.row_per, cost.rows, cost.bytes) for cost in found.costs] == [
        ("this run: experts pinned", "token and rank", 200, 8000),
        ("this run, if experts were interleaved", "token and rank", 300, 12000),
        ("Megatron-Core's dispatcher, same choices", "token and expert", 400, 16000),
        ("fixed top-k, as many true experts", "token and expert", 600, 24000),
        ("top-2, no null experts", "token and expert", 800, 32000),
    ]
    assert [cost.seconds for cost in found.costs] == ["0.250", *["counted"] * 4]


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ({"pinned": 400, "interleaved": 400}, "as many rows as interleaved would."),
        ({"pinned": 400, "interleaved": 320}, "25.0% more rows than interleaved would."),
        ({"pinned": 400, "interleaved": 0}, "more rows than interleaved would."),
        ({"pinned": 400, "a": 500, "b": 800}, "20.0% fewer rows than a would and 50.0% fewer rows than b would."),
    ],
)
def test_the_run_says_how_its_placement_compares(counted: dict[str, int], words: str) -> None:
    found = costs_of([100, 300], PINNED, counted)
    assert found.placed == f"This run's experts are pinned, which sends {words} "
