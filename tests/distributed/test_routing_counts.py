"""The asynchronous sum of routing counts starts before the output layer, is waited for in the loss, and is bit-equal to
a blocking sum."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dist.comm import collectives
from moe_dist.comm.collectives import pack
from moe_dist.comm.names import ROUTING_COUNTS
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step import training_step
from tests.support.layouts import Layout, TrainingRank, batch_of
from tests.support.worlds import RankContext


def traced_step(rank: RankContext, layout: Layout) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor]]:
    """Returns the events of a step, its counts, and blocking sums of these counts. The first of two micro-batches has no
    tokens on rank 0."""
    training, events, found, expected = TrainingRank(layout), list[str](), [], []
    model = training.parallel.model
    track, counts, losses = collectives.track_collective, training_step.global_counts, model.token_losses

    def tracked(tracker: Any, name: str, **more: Any) -> Any:
        events.append(name)
        return track(tracker, name, **more)

    def summed(own: Any, world: Any, tracker: Any) -> Callable[[], Any]:
        packed = pack(own)
        dist.all_reduce(packed)
        expected.append(packed)
        started = counts(own, world, tracker)

        def wait() -> Any:
            seen = started()
            found.append(pack(seen))
            return seen

        return wait

    def output_layer(*args: Any) -> torch.Tensor:
        events.append("output layer")
        return losses(*args)

    with (
        mock.patch.object(collectives, "track_collective", tracked),
        mock.patch.object(training_step, "global_counts", summed),
        mock.patch.object(model, "token_losses", output_layer),
    ):
        batches = [batch_of(0, 0, rank.rank, 1), batch_of(1, 0, 2 * rank.rank, 2)]
        training.step(batches, lr=1e-2, aux=AuxSettings("null_averaged", 0.02, 1e-3))
    return events, found, expected


@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
def test_the_sum_runs_beside_the_output_layer(run_in_world: Callable[..., list[Any]], data: str) -> None:
    results = run_in_world(2, traced_step, Layout(2, 1, "pinned", data))
    wanted = [ROUTING_COUNTS, "output layer", ROUTING_COUNTS]
    for events, found, expected in results:
        assert [event for event in events if event in wanted] == 2 * wanted
        assert events == results[0][0], "another order of collectives"
        assert len(found) == len(expected) == 2
        for ours, blocking in zip(found, expected, strict=True):
            assert ours.dtype == torch.float64
            assert torch.equal(ours, blocking)
        for own, of_first in zip(found, results[0][1], strict=True):
            assert torch.equal(own, of_first)
