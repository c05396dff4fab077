"""Chooses a dispatcher for `parallel.dispatch.kind=all_to_all`. All of these send the same rows, at different times."""

from typing import Any

from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher, pairs_are_rows
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.dispatch.two_batches import TwoBatchDispatcher


def all_to_all(context: DispatchContext, *, overlap: bool, chunks: int) -> Dispatcher[Any]:
    """Makes the dispatcher for the given options. Without options it is a `KnownCountsDispatcher` if each sent row belongs
    to only one (token, expert) pair, else an `AllToAllDispatcher`."""
    if context.two_batches:
        return TwoBatchDispatcher(context)
    if overlap or chunks > 1:
        return PipelinedDispatcher(context, overlap=overlap, chunks=chunks)
    if pairs_are_rows(context.placement):
        return KnownCountsDispatcher(context)
    return AllToAllDispatcher(context)
