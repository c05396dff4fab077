"""Simulates a micro-batch on the ranks of an EP group with a queue of events. Imports no torch.

A rank has two streams, COMPUTE and WIRE. Each stream runs its events in the order of the queue. An event starts when its
stream is free and all events that it waits for have ended. An exchange starts only when all ranks have reached it, so the
slowest rank sets the pace. The seconds of an event differ between ranks and between draws of the routing.

Shape letters: S draws of the routing, R ranks of an EP group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from moe_dist.plan.rates import LinkSection, Rates

COMPUTE, WIRE = 0, 1
Seconds = Any  # np.ndarray [S, R], or one number for all draws and ranks


class Event(NamedTuple):
    """One entry of the queue. `after` has the indices of earlier events on the same rank that must have ended first."""

    part: str
    stream: int
    seconds: Seconds
    after: tuple[int, ...] = ()


@dataclass
class Queue:
    """The events of a rank, in the order in which it issues them."""

    events: list[Event] = field(default_factory=list)

    def add(self, part: str, stream: int, seconds: Seconds, *after: int) -> int:
        """Appends an event and returns its index."""
        self.events.append(Event(part, stream, seconds, after))
        return len(self.events) - 1


@dataclass(frozen=True)
class Played:
    """The result of `play`.

    Attributes:
        seconds_S: Seconds until all ranks have finished.
        busy_SR: Seconds in which each rank computes, or waits for a host sync.
        wire_S: Seconds in which the rank that sends the most rows exchanges rows.
    """

    seconds_S: np.ndarray
    busy_SR: np.ndarray
    wire_S: np.ndarray


def play(events: Sequence[Event], draws: int, ranks: int, *, cores: float | None = None) -> Played:
    """Simulates the events of a queue. The ranks share `cores` cores. This number may be below 1 if other ranks use the
    same cores. None means that each rank has a separate device."""
    clock, busy = np.zeros((2, draws, ranks)), np.zeros((2, draws, ranks))
    ended: list[np.ndarray] = []
    for event in events:
        ready_SR = clock[event.stream]
        for other in event.after:
            ready_SR = np.maximum(ready_SR, ended[other])
        if event.stream == WIRE:
            ready_SR = ready_SR.max(1, keepdims=True)
        elif cores is not None and cores < ranks:
            ended.append(share_cores(ready_SR, np.broadcast_to(event.seconds, ready_SR.shape), cores))
            clock[COMPUTE], busy[COMPUTE] = ended[-1], busy[COMPUTE] + event.seconds
            continue
        clock[event.stream] = ready_SR + event.seconds
        busy[event.stream] += event.seconds
        ended.append(clock[event.stream].copy())
    return Played(clock.max((0, 2)), busy[COMPUTE], busy[WIRE].max(1))


def share_cores(start_SR: np.ndarray, work_SR: np.ndarray, cores: float) -> np.ndarray:
    """Returns the time at which each rank ends its work. Running ranks share the cores evenly, but a rank uses at most
    one."""
    end_SR = start_SR + work_SR
    for start_R, work_R, end_R in zip(start_SR, work_SR, end_SR, strict=True):
        left_R, now = work_R.copy(), start_R.min()
        open_R = left_R > 0
        while open_R.any():
            runs_R = open_R & (start_R <= now)
            waits_R = open_R & ~runs_R
            nearest = start_R[waits_R].min() if waits_R.any() else np.inf
            if not runs_R.any():
                now = nearest
                continue
            speed = min(1.0, cores / runs_R.sum())
            least = left_R[runs_R].min()
            if nearest < now + least / speed:
                left_R[runs_R] -= (nearest - now) * speed
                now = nearest
                continue
            # compares times, because their rounded difference may never become 0
            done_R = runs_R & (left_R == least)
            left_R[runs_R] -= least
            now += least / speed
            end_R[done_R] = now
            open_R &= ~done_R
    return end_SR


def expected_longest(seconds_S: np.ndarray, groups: int) -> float:
    """Returns the mean time until the slowest of `groups` EP groups is done: the mean of the longest of `groups`
    independent draws. The longest draw is the k-th smallest of S values with probability (k / S)^groups - ((k - 1) /
    S)^groups."""
    share = (np.arange(len(seconds_S) + 1) / len(seconds_S)) ** groups
    return float(np.sort(seconds_S) @ np.diff(share))


def exchange_seconds(rates: Rates, ranks: int, inside: Seconds, between: Seconds) -> Seconds:
    """Returns the seconds of one exchange in which `ranks` ranks of a node take part. `inside` and `between` are the bytes
    that a rank sends (or receives, if more) inside its node and between nodes. Both are sent at the same time."""
    near, far = rates.link(ranks), rates.between
    seconds = np.where(np.asarray(inside) > 0, inside / near.bytes_per_second, 0.0) + near.latency * (ranks > 1)
    if far is not None and np.any(between):
        seconds = np.maximum(seconds, far.latency + between / far.bytes_per_second)
    return rates.scale.exchange * seconds


def collective_seconds(rates: Rates, num_bytes: float, ranks: int, ranks_of_node: int) -> float:
    """Returns the seconds in which each of `ranks` ranks sends `num_bytes` along a ring. On each node, at least
    `ranks_of_node` of them share its links to other nodes; the node with fewest of them sets the pace."""
    if ranks == 1:
        return 0.0
    here = min(ranks, ranks_of_node)
    link: LinkSection = rates.link(max(2, here))
    rate, latency = link.bytes_per_second, link.latency
    if ranks > ranks_of_node and rates.between is not None:
        rate = min(rate, rates.between.bytes_per_second * here) if here > 1 else rates.between.bytes_per_second
        latency = rates.between.latency
    return rates.scale.exchange * (num_bytes / rate + latency)


@dataclass(frozen=True)
class LayerCost:
    """Seconds that the parts of one layer take in forward, as arrays [S, R] or numbers. In backward, attention and experts
    take `Order.backward` times as long.

    Attributes:
        dense: Attention, norms and router.
        shared: The FFN that computes all tokens: the shared expert, or a dense FFN.
        own, others: Experts for the rank's own tokens, and for the tokens of other ranks.
        pack: Packing rows before an exchange, and summing rows after it.
        counts: Exchange of row counts and indices; 0 if it is not needed.
        sync: Host sync in which the host reads the split sizes.
        weights: Exchange of a chunk's pair weights before its rows, and of their gradients; 0 if rows include the weights.
        hops: The exchanges in one chunk's dispatch, one after another; combine takes as long. Empty for a single rank.
    """

    dense: Seconds = 0.0
    shared: Seconds = 0.0
    own: Seconds = 0.0
    others: Seconds = 0.0
    pack: Seconds = 0.0
    counts: Seconds = 0.0
    sync: Seconds = 0.0
    weights: Seconds = 0.0
    hops: tuple[Seconds, ...] = ()


BACKWARD = 2.0  # seconds of backward / seconds of forward: for a product with a trained weight, backward has two products


@dataclass(frozen=True)
class Order:
    """The order of exchanges and products in a layer, from parallel.dispatch and parallel.recompute.

    Attributes:
        backward: Ratio of backward's seconds to forward's.
        again: Seconds of a recomputed forward divided by the seconds of the first forward.
    """

    overlap: bool = False
    chunks: int = 1
    recompute: str = "none"
    backward: float = BACKWARD
    again: float = 1.0


def micro_batch(
    layers: Sequence[LayerCost], head: Seconds, order: Order, backward: Sequence[LayerCost] | None = None
) -> list[Event]:
    """Returns the queue of one micro-batch: the forward of all layers, the output layer with the loss, and backward.
    `backward` has the layers' costs in backward, not yet multiplied by `order.backward`; None means forward's costs."""
    queue = Queue()
    last: tuple[int, ...] = ()
    for layer in layers:
        last = (_forward(queue, layer, order, last),)
    last = (queue.add("head", COMPUTE, head * (1 + order.backward), *last),)
    for layer, costs in zip(reversed(layers), reversed(backward or layers), strict=True):
        if order.recompute == "block":  # recomputes attention, dispatch and experts, but not combine
            last = (_forward(queue, _times(layer, order.again), order, last, repeated=True),)
        last = (_backward(queue, costs, order, last),)
    return queue.events


def _times(layer: LayerCost, factor: float) -> LayerCost:
    """Returns a layer's costs in which the seconds of compute are multiplied by `factor`."""
    names = ("dense", "shared", "own", "others", "pack")
    return replace(layer, **{name: factor * getattr(layer, name) for name in names})


def send(queue: Queue, layer: LayerCost, chunks: int, *after: int, weights: Seconds = 0.0) -> int:
    """Adds the exchange of weights, if there is one, and then the hops of one chunk's exchange to the queue."""
    if np.any(weights):
        after = (queue.add("exchange", WIRE, weights, *after),)
    for number, hop in enumerate(layer.hops):
        if number:
            after = (queue.add("pack", COMPUTE, layer.pack / chunks, *after),)
        after = (queue.add("exchange", WIRE, hop, *after),)
    return after[-1]


def _forward(queue: Queue, layer: LayerCost, order: Order, after: tuple[int, ...], *, repeated: bool = False) -> int:
    """Adds the events of a layer's forward to the queue, and returns the last event's index. The chunks' exchanges have the
    order dispatch 0, dispatch 1, combine 0, dispatch 2, ..."""
    start = queue.add("dense", COMPUTE, layer.dense, *after)
    if not layer.hops:
        return queue.add("experts", COMPUTE, layer.shared + layer.own + layer.others + layer.pack, start)
    if not repeated:
        counted = queue.add("exchange", WIRE, layer.counts, start)
        start = queue.add("sync", COMPUTE, layer.sync, counted)
    n = order.chunks
    packed = queue.add("pack", COMPUTE, layer.pack, start)
    alone = layer.own if order.overlap else 0.0
    rest = layer.others + (0.0 if order.overlap else layer.own)
    sent = [send(queue, layer, n, packed, weights=layer.weights)]
    ends = [packed]
    if not order.overlap:
        ends.append(queue.add("experts", COMPUTE, layer.shared, sent[0]))
    for chunk in range(n):
        if chunk + 1 < n:
            sent.append(send(queue, layer, n, packed, weights=layer.weights))
        if order.overlap:
            queue.add("experts", COMPUTE, (alone + layer.shared) / n, packed)
        ends.append(queue.add("experts", COMPUTE, rest / n, sent[chunk]))
        if not repeated:
            ends.append(send(queue, layer, n, ends[-1]))
    return queue.add("pack", COMPUTE, 0.0 if repeated else layer.pack, *ends[-2:])


def _backward(queue: Queue, layer: LayerCost, order: Order, after: tuple[int, ...]) -> int:
    """Adds a layer's backward to the queue. Gradients of outputs go to the experts' ranks; gradients of rows return."""
    back, again = order.backward, order.again if order.recompute == "experts" else 0.0
    if not layer.hops:
        experts = (back + again) * (layer.own + layer.others) + back * (layer.shared + layer.pack)
        last = queue.add("experts", COMPUTE, experts, *after)
        return queue.add("dense", COMPUTE, back * layer.dense, last)
    n = order.chunks
    alone = (back + again) * layer.own / n if order.overlap else 0.0
    rest = (back + again) * (layer.others + (0.0 if order.overlap else layer.own)) / n
    packed = queue.add("pack", COMPUTE, layer.pack, *after)
    sent, ends = [send(queue, layer, n, packed)], [packed]
    for chunk in range(n):
        if chunk + 1 < n:
            sent.append(send(queue, layer, n, packed))
        done = queue.add("experts", COMPUTE, rest, sent[chunk])
        ends.append(send(queue, layer, n, done, weights=layer.weights))
        if order.overlap:
            queue.add("experts", COMPUTE, alone, done)
    queue.add("experts", COMPUTE, back * layer.shared, packed)
    last = queue.add("pack", COMPUTE, layer.pack, *ends[-1:])
    return queue.add("dense", COMPUTE, back * layer.dense, last)
