"""The simulated time of a micro-batch equals the time in a slow event queue over single ranks, and the time by closed
forms."""

import heapq
from typing import Any

import numpy as np
import pytest

from moe_dist.plan.rates import CurveSection, LinkSection, Rates
from moe_dist.plan.step_model import (
    BACKWARD,
    WIRE,
    Event,
    LayerCost,
    Order,
    collective_seconds,
    exchange_seconds,
    micro_batch,
    play,
    share_cores,
)

CURVE = CurveSection(sizes=(1.0, 100.0), rates=(1e9, 1e11))
RATES = Rates(
    machine="test", card="test", source="measured", memory=8e9, gemm=CURVE, grouped=CURVE, attention=1e10, copy_rate=1e10,
    loss=1e10, launch=0.0, sync=0.0, ranks_per_node=4, between=LinkSection(ranks=8, latency=0.5, bytes_per_second=2.0),
    inside=tuple(LinkSection(ranks=n, latency=n / 20, bytes_per_second=12.0 - n) for n in (2, 4)),
)  # fmt: skip


def slow_play(events: list[Event], ranks: int) -> list[float]:
    """Returns the time at which each rank ends. A heap has the tasks that single ranks can start, and each exchange is a
    barrier."""
    todo = [{stream: [i for i, e in enumerate(events) if e.stream == stream] for stream in (0, 1)} for _ in range(ranks)]
    done: list[dict[int, float]] = [{} for _ in range(ranks)]
    came: dict[int, dict[int, float]] = {}
    free = [[0.0, 0.0] for _ in range(ranks)]
    heap = [(0.0, rank, stream) for rank in range(ranks) for stream in (0, 1)]
    while heap:
        now, rank, stream = heapq.heappop(heap)
        if not todo[rank][stream]:
            continue
        index = todo[rank][stream][0]
        event = events[index]
        if any(other not in done[rank] for other in event.after):
            continue  # it is tried again when its last predecessor ends
        start = max(now, free[rank][stream], *(done[rank][other] for other in event.after), 0.0)
        meeting = {rank: start}
        if stream == WIRE:
            came.setdefault(index, {})[rank] = start
            if len(came[index]) < ranks:
                continue
            meeting = dict.fromkeys(came[index], max(came[index].values()))
        for who, began in meeting.items():
            seconds = float(np.broadcast_to(event.seconds, (1, ranks))[0, who])
            todo[who][stream].pop(0)
            done[who][index] = free[who][stream] = began + seconds
            for other in (0, 1):
                heapq.heappush(heap, (began + seconds, who, other))
    assert not any(any(each.values()) for each in todo), "the queue stands still"
    return [max(each) for each in free]


def layers_of(rng: np.random.Generator, ranks: int, layers: int, hops: int) -> list[LayerCost]:
    def draw() -> np.ndarray:
        return rng.random((1, ranks)) * (rng.random((1, ranks)) < 0.8)

    names = ("dense", "shared", "own", "others", "pack", "counts", "sync", "weights")
    return [LayerCost(**{name: draw() for name in names}, hops=tuple(draw() for _ in range(hops))) for _ in range(layers)]


@pytest.mark.parametrize(
    ("overlap", "chunks", "recompute", "hops"),
    [(False, 1, "none", 1), (True, 1, "experts", 1), (False, 3, "block", 1), (True, 2, "block", 2), (False, 1, "none", 0)],
)
def test_plays_as_a_slow_queue_does(overlap: bool, chunks: int, recompute: str, hops: int) -> None:
    rng = np.random.default_rng(chunks + hops)
    for ranks in (1, 3):
        events = micro_batch(layers_of(rng, ranks, 3, hops), rng.random(), Order(overlap, chunks, recompute))
        assert play(events, 1, ranks).seconds_S == pytest.approx(max(slow_play(events, ranks)))
    # Draws within one call are independent.
    one, other = (layers_of(rng, 2, 2, hops) for _ in range(2))
    both = [
        LayerCost(
            **{name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in vars(a) if name != "hops"},
            hops=tuple(np.concatenate(pair) for pair in zip(a.hops, b.hops, strict=True)),
        )
        for a, b in zip(one, other, strict=True)
    ]
    order = Order(overlap, chunks, recompute)
    alone = [play(micro_batch(each, 1.0, order), 1, 2).seconds_S[0] for each in (one, other)]
    assert play(micro_batch(both, 1.0, order), 2, 2).seconds_S == pytest.approx(alone)


def even(**changes: Any) -> LayerCost:
    return LayerCost(**{"dense": 1.0, "own": 1.0, "others": 3.0, "hops": (2.0,), **changes})


def seconds(layer: LayerCost, order: Order = Order(), ranks: int = 2) -> float:
    return float(play(micro_batch([layer], 0.0, order), 1, ranks).seconds_S[0])


def test_overlap_and_chunks_hide_what_the_dispatcher_lets_them_hide() -> None:
    # In forward a rank's own pairs take 1 s and overlap with the dispatch, which takes 2 s. In backward they take 2 s
    # and overlap with the exchange of gradients, which takes 2 s.
    assert seconds(even(), Order(overlap=True)) == pytest.approx(seconds(even()) - 1.0 - 2.0)
    # Each of two chunks takes 1 s for dispatch, 2 s for experts (in forward), and 1 s for combine. Experts hide all
    # exchanges but the first dispatch and the last combine.
    chunked = even(hops=(1.0,))
    assert seconds(chunked, Order(chunks=2)) == pytest.approx((1 + BACKWARD) * 5.0 + 4 * 1.0)
    # If the network is slower than the experts, all chunks are sent one after the other.
    slow = even(hops=(50.0,), own=0.0, others=0.2)
    assert seconds(slow, Order(chunks=2)) == pytest.approx(8 * 50.0 + 3.0 + 0.0, abs=0.7)


def test_shared_cores() -> None:
    start, work = np.array([[0.0, 0.0, 1.0]]), np.array([[2.0, 2.0, 1.0]])
    assert share_cores(start, work, 3)[0] == pytest.approx([2, 2, 2])
    assert share_cores(np.zeros((1, 4)), np.full((1, 4), 3.0), 2)[0] == pytest.approx([6, 6, 6, 6])
    # For one second, two ranks have a core each. Then three ranks, each with 1 s of work left, share two cores.
    assert share_cores(start, work, 2)[0] == pytest.approx([2.5, 2.5, 2.5])
    assert share_cores(np.array([[0.0, 9.0]]), np.array([[0.0, 1.0]]), 1)[0] == pytest.approx([0, 10])
    rng = np.random.default_rng(0)
    for _ in range(4):
        start, work = rng.random((1, 4)), rng.random((1, 4))
        left, ends, now, step = work[0].copy(), np.zeros(4), 0.0, 1e-3
        while (left > 0).any():
            runs = (start[0] <= now) & (left > 0)
            left[runs] -= step * min(1.0, 2 / max(1, runs.sum()))
            now += step
            ends[runs & (left <= 0)] = now
        assert share_cores(start, work, 2)[0] == pytest.approx(ends, abs=1e-2)
    events = micro_batch([even(hops=())], 0.0, Order())
    assert play(events, 1, 4, cores=2).seconds_S == pytest.approx([30.0])


def test_exchanges_and_rings() -> None:
    assert exchange_seconds(RATES, 2, 10.0, 0.0) == pytest.approx(1.1)
    assert exchange_seconds(RATES, 3, 16.0, 0.0) == pytest.approx(2.2)  # uses the rates of the next larger number of ranks
    assert exchange_seconds(RATES, 4, 16.0, 10.0) == pytest.approx(5.5)  # both levels work at once, so the slower counts
    assert exchange_seconds(RATES, 1, 0.0, 0.0) == 0.0
    assert collective_seconds(RATES, 8.0, 4, 4) == pytest.approx(1.2)
    assert collective_seconds(RATES, 6.0, 8, 4) == pytest.approx(1.25)  # four ranks of a node together send 8 per second
    assert collective_seconds(RATES, 8.0, 8, 1) == pytest.approx(4.5)
    assert collective_seconds(RATES, 8.0, 1, 1) == 0.0
    assert CURVE.at(np.array([0.0, 10.0, 1e6])) == pytest.approx([1e9, 1e10, 1e11])
