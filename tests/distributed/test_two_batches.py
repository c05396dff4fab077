"""Two halves of a micro-batch take turns, so that exchanges of one half overlap with computation of the other half.
test_n_ranks_equal_one.py compares the results."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS
from tests.distributed.test_collective_order import recorded_pass
from tests.support.cover import full
from tests.support.layouts import LAYERS, Layout

EXCHANGES = (DISPATCH_ROWS, COMBINE_ROWS, DISPATCH_ROWS + BACKWARD, COMBINE_ROWS + BACKWARD)
FSDP2: dict[str, Any] = {"data": "fsdp2", "fsdp_gather": "step"}


LAYOUTS = [Layout(2, 2, "interleaved", **FSDP2, halves=True), full(Layout(4, 1, "uneven", halves=True, free=True))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_half_computes_while_the_exchange_of_the_other_is_in_flight(
    run_in_world: Callable[..., list[Any]], layout: Layout
) -> None:
    wanted = tuple([*EXCHANGES, *(f"wait {name}" for name in EXCHANGES), "pairs", "pairs backward", "attention"])
    route = ["attention", DISPATCH_ROWS]
    experts = [f"wait {DISPATCH_ROWS}", "pairs", COMBINE_ROWS]
    forward = [*route * 2]
    for layer in range(LAYERS):
        forward += experts * 2 + [f"wait {COMBINE_ROWS}", *(route if layer + 1 < LAYERS else [])] * 2
    sent, back = COMBINE_ROWS + BACKWARD, DISPATCH_ROWS + BACKWARD
    backward = [sent] * 2
    for layer in range(LAYERS):
        backward += [f"wait {sent}", "pairs backward", back] * 2
        backward += [f"wait {back}", "attention backward", *([sent] if layer + 1 < LAYERS else [])] * 2
    for events in run_in_world(layout.world_size, recorded_pass, layout):
        kept = [event for event in events if event in (*wanted, "attention backward")]
        assert kept == forward + backward


@pytest.mark.parametrize("edp", [full(1), 2])
def test_all_gathers_come_before_and_all_sums_behind_the_exchanges(
    run_in_world: Callable[..., list[Any]], edp: int
) -> None:
    layout = Layout(2, edp, "interleaved", **FSDP2, halves=True)
    everywhere = run_in_world(layout.world_size, recorded_pass, layout)
    for events in everywhere:
        rows = [at for at, event in enumerate(events) if event.endswith(("rows", f"rows{BACKWARD}"))]
        gathers = [at for at, event in enumerate(events) if event.startswith("gather")]
        sums = [at for at, event in enumerate(events) if event.startswith("reduce")]
        assert len(gathers) > LAYERS
        assert len(sums) > LAYERS
        first_backward = next(at for at, event in enumerate(events) if event == COMBINE_ROWS + BACKWARD)
        last_forward = max(at for at in rows if at < first_backward)
        assert all(at < rows[0] or last_forward < at < first_backward for at in gathers)
        assert min(sums) > rows[-1]
        collectives = [event for event in events if event.startswith(("gather", "reduce")) or "rows" in event]
        theirs = [event for event in everywhere[0] if event.startswith(("gather", "reduce")) or "rows" in event]
        assert collectives == theirs
