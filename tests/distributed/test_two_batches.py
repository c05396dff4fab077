"""Two halves of a micro-batch in turns: overlaps of exchanges and computation, and the same bits as one half after the
other."""

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS
from moe_dist.model import two_batches
from moe_dist.parallel.mesh import make_mesh
from tests.distributed.test_collective_order import recorded_pass
from tests.support.cover import full
from tests.support.layouts import LAYERS, Layout, batch_of, build
from tests.support.worlds import RankContext

EXCHANGES = (DISPATCH_ROWS, COMBINE_ROWS, DISPATCH_ROWS + BACKWARD, COMBINE_ROWS + BACKWARD)
FSDP2: dict[str, Any] = {"data": "fsdp2", "fsdp_gather": "step"}


def one_pass(rank: RankContext, layout: Layout, *, in_turns: bool, dtype: str) -> tuple[list[str], list[Any]]:
    """Returns the events, logits and gradients of one forward and backward."""
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
    events: list[str] = []
    parallel = build(layout, mesh, CommStats(events=events))
    for layer in parallel.model.layers:
        layer.attention.o.register_forward_hook(lambda _m, _i, out: note(out))  # pyright: ignore

    def note(out: torch.Tensor) -> None:
        events.append("attention")
        out.register_hook(lambda _: events.append("attention backward"))

    def one_after_the_other(runs: Sequence[Generator[None, None, Any]]) -> list[Any]:
        results = []
        for run in runs:
            while True:
                try:
                    next(run)
                except StopIteration as end:
                    results.append(end.value)
                    break
        return results

    batch = batch_of(0, 0, 2 * rank.rank, 2)
    group = torch.where(batch.padding_BS, -1, batch.modality_BS)
    turns = two_batches.in_turns if in_turns else one_after_the_other
    with mock.patch.object(two_batches, "in_turns", turns), parallel.micro_batch(last=True):
        logits, reports = parallel(batch.tokens_BS, batch.positions_BS, batch.documents_BS, group)
        (logits.square().sum() + sum(report.aux.prob_LC.square().sum() for report in reports)).backward()
    grads = [None if each.parameter.grad is None else each.parameter.grad for each in parallel.parameters]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]  # pyright: ignore
    counts = [each for report in reports for each in (report.sent.rows_remote, report.sent.pairs, report.counts.choices_LC)]
    return events, [logits.detach(), *(g for g in local if g is not None), *map(torch.as_tensor, counts)]


def both_ways(rank: RankContext, layout: Layout) -> tuple[list[str], int]:
    """Runs the halves in turns, and compares all bits with one half after the other. Returns the events."""
    events, ours = one_pass(rank, layout, in_turns=True, dtype=layout.precision)
    other_events, theirs = one_pass(rank, layout, in_turns=False, dtype=layout.precision)
    assert events != other_events
    assert len(ours) == len(theirs) > 10
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got, wanted)
    return events, len(ours)


LAYOUTS = [
    full(Layout(2, 1, "uneven", halves=True, precision="bfloat16")),
    full(Layout(2, 1, "pinned", recompute="experts", halves=True, precision="float32")),
    Layout(2, 2, "interleaved", **FSDP2, halves=True, precision="bfloat16"),
    Layout(4, 1, "uneven", halves=True, precision="float32", free=True),
]


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
    for events, _ in run_in_world(layout.world_size, both_ways, layout):
        kept = [event for event in events if event in (*wanted, "attention backward")]
        assert kept == forward + backward


@pytest.mark.parametrize("edp", [1, 2])
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


def test_pairwise_order_needs_two_runs() -> None:
    seen: list[int] = []

    def run(number: int, turns: int) -> Generator[None, None, int]:
        for _ in range(turns):
            seen.append(number)
            yield
        return number

    assert two_batches.in_turns([run(0, 2), run(1, 2)]) == [0, 1]
    assert all(a != b for a, b in pairwise(seen))
