"""The recorded order shows which computations overlap with which exchanges."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS, REPLICAS
from tests.distributed.test_collective_order import recorded_pass
from tests.support.layouts import LAYERS, Layout


def events_of(run_in_world: Callable[..., list[Any]], layout: Layout) -> list[str]:
    """Returns the events of one forward and backward of the whole model, without exchanges of metadata. All ranks must
    exchange rows in the same order."""
    everywhere = run_in_world(layout.world_size, recorded_pass, layout)
    exchanged = (DISPATCH_ROWS, COMBINE_ROWS, REPLICAS)
    wanted = (*exchanged, *(f"wait {name}" for name in exchanged), "own pairs", "shared", "pairs")
    kept = [[event for event in events if event.startswith(wanted)] for events in everywhere]
    for events in kept:
        assert [e for e in events if "rows" in e] == [e for e in kept[0] if "rows" in e]
    return kept[-1]


@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recompute", ["none", "experts"])
def test_own_pairs_and_the_shared_expert_are_computed_while_rows_fly(
    run_in_world: Callable[..., list[Any]], data: str, recompute: str
) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", data, recompute, overlap=True))
    forward = [DISPATCH_ROWS, "shared", "own pairs", f"wait {DISPATCH_ROWS}", "pairs", COMBINE_ROWS, f"wait {COMBINE_ROWS}"]
    assert events[: LAYERS * len(forward)] == forward * LAYERS
    backward = events[LAYERS * len(forward) :]
    half = len(backward) // LAYERS
    assert backward[:half] == backward[half:]
    start = [COMBINE_ROWS + BACKWARD, f"wait {COMBINE_ROWS}{BACKWARD}", "pairs backward", DISPATCH_ROWS + BACKWARD]
    assert backward[: len(start)] == start
    assert sorted(backward[len(start) : half - 1]) == ["own pairs backward", "shared backward"]
    assert backward[half - 1] == f"wait {DISPATCH_ROWS}{BACKWARD}"


def test_a_chunk_is_dispatched_while_the_one_before_is_computed(run_in_world: Callable[..., list[Any]]) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", "fsdp2", chunks=3))
    forward = [
        "dispatch rows 0", "dispatch rows 1",
        "wait dispatch rows 0", "pairs 0", "combine rows 0", "dispatch rows 2",
        "wait dispatch rows 1", "pairs 1", "wait combine rows 0", "combine rows 1",
        "wait dispatch rows 2", "pairs 2", "wait combine rows 1", "combine rows 2", "wait combine rows 2",
    ]  # fmt: skip
    backward = [
        "combine rows backward 2", "wait combine rows backward 2", "combine rows backward 1",
        "pairs 2 backward", "dispatch rows backward 2", "wait combine rows backward 1", "combine rows backward 0",
        "pairs 1 backward", "dispatch rows backward 1", "wait dispatch rows backward 2", "wait combine rows backward 0",
        "pairs 0 backward", "dispatch rows backward 0", "wait dispatch rows backward 1", "wait dispatch rows backward 0",
    ]  # fmt: skip
    assert events == forward * LAYERS + backward * LAYERS


def test_weights_of_replicas_are_exchanged_once_around_all_chunks(run_in_world: Callable[..., list[Any]]) -> None:
    """The weights of both groups' replicas are sent before the rows, and the shared expert overlaps with them. In
    backward the gradients of replicas are sent after the rows."""
    events = events_of(run_in_world, Layout(2, 1, "interleaved", overlap=True, chunks=2, replicas=True))
    forward = [
        REPLICAS, REPLICAS, "dispatch rows 0", "dispatch rows 1", "shared", "own pairs",
        f"wait {REPLICAS}", f"wait {REPLICAS}", "wait dispatch rows 0",
        "pairs 0", "combine rows 0", "wait dispatch rows 1", "pairs 1", "wait combine rows 0", "combine rows 1",
        "wait combine rows 1",
    ]  # fmt: skip
    backward = [
        "combine rows backward 1", "wait combine rows backward 1", "combine rows backward 0", "pairs 1 backward",
        "dispatch rows backward 1", "wait combine rows backward 0", "pairs 0 backward", "dispatch rows backward 0",
        "own pairs backward", "shared backward", "wait dispatch rows backward 1", "wait dispatch rows backward 0",
        *[REPLICAS + BACKWARD, f"wait {REPLICAS}{BACKWARD}"] * 2,
    ]  # fmt: skip
    assert events == forward * LAYERS + backward * LAYERS


def test_a_recomputed_block_repeats_the_way_out_alone(run_in_world: Callable[..., list[Any]]) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", "fsdp2", "block", overlap=True, chunks=2))
    for name, times in ((DISPATCH_ROWS, 2), (COMBINE_ROWS, 1), (DISPATCH_ROWS + BACKWARD, 1)):
        for chunk in (" 0", " 1"):
            assert events.count(name + chunk) == events.count(f"wait {name}{chunk}") == times * LAYERS
