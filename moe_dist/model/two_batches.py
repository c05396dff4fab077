"""Runs a transformer's layers alternately on the two halves of a micro-batch. The exchanges of one half are in flight while
the other half computes. Shape letters: B sequences, S positions, T tokens of a half, D hidden size.

Each half is a generator, which yields at each exchange (`moe_dist.moe.dispatch.two_batches` draws the order). Each token is
routed independently, so routing two halves gives the same result as routing the whole micro-batch. The reports of both
halves are added, so the losses also equal the whole micro-batch's losses.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_dist.comm.collectives import added
from moe_dist.moe.dispatch.two_batches import Chain
from moe_dist.moe.routing.types import ChosenColumns, LayerReport, RoutingRequest

Half = tuple[Tensor, tuple[Tensor, ...], Any, Tensor]  # x [B / 2, S, D], rotary table, masks by window, group of each token
R = TypeVar("R")


def run_layers(layers: Iterable[Any], halves: Sequence[Half], request: RoutingRequest) -> tuple[Tensor, list[LayerReport]]:
    """Returns the last layer's output [B, S, D], and the report of each MoE layer on the whole micro-batch."""
    chain, layers = Chain(halves[0][0]), list(layers)
    (first, second) = in_turns([_steps(layers, *half, request, chain) for half in halves])
    return torch.cat([first[0], second[0]]), [_joined(*pair) for pair in zip(first[1], second[1], strict=True)]


def in_turns(runs: Sequence[Generator[None, None, R]]) -> list[R]:
    """Runs each generator in turn up to its next `yield`, until all end. Returns their results in order."""
    results: dict[int, R] = {}
    while len(results) < len(runs):
        for index, run in enumerate(runs):
            if index not in results:
                try:
                    next(run)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(runs))]


def _steps(
    layers: Iterable[Any],
    x_BSD: Tensor,
    rotary: tuple[Tensor, ...],
    masks: Any,
    group_BS: Tensor,
    request: RoutingRequest,
    chain: Chain,
) -> Generator[None, None, tuple[Tensor, list[LayerReport]]]:
    """Runs all layers on one half. Calls each module's `forward` directly to avoid FSDP2's hooks, which would gather and
    reduce between the exchanges of the other half. ParallelModel gathers all parameters before the first layer."""
    reports = []
    for layer in layers:
        x_BSD = x_BSD + layer.attention.forward(x_BSD, rotary, masks[layer.window])
        if not layer.has_experts:
            x_BSD = x_BSD + layer.ffn.forward(x_BSD)
            continue
        y_TD, report = yield from layer.moe.steps(x_BSD.flatten(0, 1), group_BS.flatten(), request, chain)
        x_BSD = x_BSD + y_TD.view_as(x_BSD)
        reports.append(report)
    return x_BSD, reports


def _joined(first: LayerReport, second: LayerReport) -> LayerReport:
    """Returns the sum of the reports of both halves."""
    chosen = None
    if first.chosen is not None and second.chosen is not None:
        chosen = ChosenColumns(*map(torch.cat, zip(first.chosen, second.chosen, strict=True)))
    counts, aux = added([first.counts, second.counts]), added([first.aux, second.aux])
    return LayerReport(counts, aux, added([first.sent, second.sent]), chosen=chosen)
