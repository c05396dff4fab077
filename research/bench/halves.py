"""Makes the queue of a micro-batch with `parallel.two_batch_overlap`, for simulation by `moe_dist.plan.step_model.play`."""

from collections.abc import Generator, Iterator, Sequence

from moe_dist.plan.step_model import BACKWARD, COMPUTE, WIRE, Event, LayerCost, Queue, Seconds, send


def micro_batch_in_halves(layers: Sequence[LayerCost], head: Seconds, backward: Sequence[LayerCost]) -> list[Event]:
    """Returns the queue of one micro-batch with `parallel.two_batch_overlap`. As in `moe.dispatch.two_batches`, one half of
    the micro-batch runs up to its next exchange, then the other half runs up to its next exchange, and so on. All costs
    are those of one half of the micro-batch."""
    queue = Queue()
    last = _in_turns([_half_forward(queue, layers) for _ in range(2)])
    last = (queue.add("head", COMPUTE, head * (1 + BACKWARD), *last),)
    _in_turns([_half_backward(queue, backward, last) for _ in range(2)])
    return queue.events


def _in_turns(halves: Sequence[Iterator[int]]) -> tuple[int, ...]:
    """Runs both halves of a micro-batch alternately, and returns the last event of each half."""
    last = [0 for _ in halves]
    for events in zip(*halves, strict=True):
        last = list(events)
    return tuple(last)


def _half_forward(queue: Queue, layers: Sequence[LayerCost]) -> Iterator[int]:
    last: tuple[int, ...] = ()
    for layer in layers:
        last = (queue.add("dense", COMPUTE, layer.dense, *last),)
        if not layer.hops:
            last = (queue.add("experts", COMPUTE, layer.shared + layer.own + layer.others + layer.pack, *last),)
            continue
        counted = queue.add("exchange", WIRE, layer.counts, *last)
        start = queue.add("sync", COMPUTE, layer.sync, counted)
        sent = send(queue, layer, 1, queue.add("pack", COMPUTE, layer.pack, start), weights=layer.weights)
        yield queue.add("experts", COMPUTE, layer.shared)
        sent = yield from _experts_of_half(queue, layer, 1.0, sent)
        last = (queue.add("pack", COMPUTE, layer.pack, sent),)
    yield from last


def _half_backward(queue: Queue, layers: Sequence[LayerCost], last: tuple[int, ...]) -> Iterator[int]:
    for layer in reversed(layers):
        if not layer.hops:
            experts = layer.shared + layer.own + layer.others + layer.pack
            done = queue.add("experts", COMPUTE, BACKWARD * experts, *last)
            last = (queue.add("dense", COMPUTE, BACKWARD * layer.dense, done),)
            continue
        sent = send(queue, layer, 1, queue.add("pack", COMPUTE, layer.pack, *last))
        yield sent
        sent = yield from _experts_of_half(queue, layer, BACKWARD, sent)
        summed = queue.add("pack", COMPUTE, layer.pack, sent)
        last = (queue.add("dense", COMPUTE, BACKWARD * (layer.shared + layer.dense), summed),)
    yield from last


def _experts_of_half(queue: Queue, layer: LayerCost, times: float, sent: int) -> Generator[int, None, int]:
    done = queue.add("experts", COMPUTE, times * (layer.own + layer.others), sent)
    back = send(queue, layer, 1, done)
    yield done
    return back
