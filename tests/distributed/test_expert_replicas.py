"""Replicas of hot experts change weights, moments and norms of a run only by rounding.

The test makes four runs of three steps. Run 1 is on one rank. Run 2 has no replicas. Run 3 gets replicas after the first
step, and other replicas after the second step. Run 4 resumes from a checkpoint that run 3 saved with its first replicas.
Runs 3 and 4 are bit-equal. Runs 1 and 2 differ from run 3 only by rounding, because an expert's gradient is a sum over
its slots. In float64 the difference is below 1e-9.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe_dist.comm.names import REPLICAS
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.replica_slots import Replica
from tests.distributed.test_expert_moves import AUX, Run
from tests.support.agreement import Arrays, merged
from tests.support.cover import exhaustive, full
from tests.support.layouts import LAYERS, MICRO_BATCHES, SEQUENCES, Layout, batch_of, placement_for
from tests.support.replicas import of_both_groups, on_others, replicate
from tests.support.whole_tensors import carry
from tests.support.worlds import RankContext

LAYOUTS = [
    Layout(2, 1, replicas=True),
    exhaustive(Layout(2, 2, "interleaved", "fsdp2", "block", replicas=True)),
    full(Layout(2, 2, "interleaved", "fsdp2", "block", overlap=True, chunks=2, replicas=True)),
    exhaustive(Layout(4, 1, "uneven", overlap=True, replicas=True)),
    full(Layout(4, 1, "uneven", pair_budget=7, replicas=True)),  # one rank has no expert
    full(Layout(4, 1, "uneven", "fsdp2", "experts", replicas=True)),
    full(Layout(2, 2, replicas=True, optimizer="muon")),
    exhaustive(Layout(2, 2, "interleaved", "fsdp2", fsdp_gather="step", replicas=True)),
    exhaustive(Layout(4, 1, "uneven", "fsdp2", chunks=3, replicas=True)),
    full(Layout(2, 1, "pinned", "ddp", "experts", pair_budget=5, overlap=True, chunks=2, replicas=True)),
    full(Layout(2, 2, "interleaved", "fsdp2", fsdp_gather="step", chunks=2, replicas=True)),
    exhaustive(Layout(4, 1, "interleaved", "ddp", "block", overlap=True, chunks=4, replicas=True)),
    full(Layout(4, 1, "uneven", "fsdp2", "block", ranks_per_node=2, replicas=True)),
]


class ReplicatedRun(Run):
    """A model in training whose experts may get replicas."""

    def __init__(
        self, rank: RankContext, layout: Layout, mesh: Mesh, placement: ExpertPlacement, *, sequences: int = SEQUENCES
    ) -> None:
        super().__init__(rank, layout, mesh, placement)
        self.each = sequences // rank.world_size
        self.comm_stats.events, self.norms, self.pairs, self.pairs_remote = [], list[float](), list[int](), list[int]()

    def step(self, number: int) -> None:
        batches = [batch_of(number, micro, self.rank.rank * self.each, self.each) for micro in range(MICRO_BATCHES)]
        result = self.training_step(batches, lr=1e-2, aux=AUX, number=number)
        self.norms.append(result.grad_norm)
        self.pairs.append(result.ledger["pairs"])
        self.pairs_remote.append(result.ledger["pairs_remote"])

    def replicate(self, *replicas: list[Replica]) -> None:
        replicate(self.parallel, self.layout, self.placement, self.comm_stats, replicas)

    @property
    def exchanges(self) -> int:
        """Returns how often the replicas' weights or gradients were exchanged so far."""
        return sum(event.startswith(f"wait {REPLICAS}") for event in self.comm_stats.events or [])


class Seen(NamedTuple):
    """Results of the runs `plain`, `replicated` and `resumed` on one rank. `norms` and `pairs_remote` have one list for
    `plain` and one for `replicated`; `exchanges` counts the exchanges of replicas in each step of `replicated`."""

    plain: Arrays
    replicated: Arrays
    resumed: Arrays
    norms: list[list[float]]
    pairs_remote: list[list[int]]
    exchanges: list[int]


def on_one_rank(rank: RankContext, layout: Layout) -> tuple[Arrays, list[float]]:
    mesh = make_mesh(ep=1, device=torch.device("cpu"), timeout=600.0)
    run = ReplicatedRun(rank, layout, mesh, placement_for(layout))
    for number in range(3):
        run.step(number)
    return run.tensors(), run.norms


def three_runs(rank: RankContext, layout: Layout) -> Seen:
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0, ranks_per_node=layout.ranks_per_node)
    start = placement_for(layout)
    # After step 0 layer 0 has replicas of an expert of one group on all ranks, and replicas of an expert of the other
    # group. After step 1 only layer 1 has replicas. They belong to two experts of one group.
    first = [of_both_groups(start), []]
    second = [[], sorted(on_others(start, 1, 1) + on_others(start, 2, 1))]
    plain, replicated, resumed = (ReplicatedRun(rank, layout, mesh, start) for _ in range(3))
    exchanges = []
    for number, replicas in enumerate(([[], []], first, second)):
        plain.step(number)
        replicated.replicate(*replicas)
        before = replicated.exchanges
        replicated.step(number)
        exchanges.append(replicated.exchanges - before)
        if number == 1:
            for run in (replicated, resumed):  # `replicated` saves the checkpoint, `resumed` loads it
                carry(rank.folder / "checkpoint", run.parallel, run.optimizer, run.placement, mesh)
    resumed.replicate(*second)
    resumed.step(2)
    assert plain.exchanges == 0
    found = (plain.tensors(), replicated.tensors(), resumed.tensors())
    two = (plain, replicated)
    return Seen(*found, [each.norms for each in two], [each.pairs_remote for each in two], exchanges)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_replicas_change_rounding_alone(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    ((one, norms),) = run_in_world(1, on_one_rank, Layout(optimizer=layout.optimizer))
    seen = run_in_world(layout.world_size, three_runs, layout)
    plain, replicated, resumed = (merged([getattr(each, field) for each in seen]) for field in Seen._fields[:3])
    assert any("exp_avg" in name and ".experts." in name for name in plain)
    torch.testing.assert_close(resumed, replicated, rtol=0, atol=0)
    torch.testing.assert_close(replicated, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(replicated, one, rtol=0, atol=1e-9)
    passes = MICRO_BATCHES * (3 if layout.recompute == "block" else 2)
    for each in seen:
        np.testing.assert_allclose(each.norms, [norms] * 2, rtol=1e-9)
        without, kept = np.array(each.pairs_remote)
        assert kept[0] == without[0]
        assert all(kept[1:] < without[1:]), "ranks with a replica keep its pairs"
        assert each.exchanges == [0, 2 * passes, passes], "of each group with replicas"


def two_runs_with_an_empty_rank(rank: RankContext, layout: Layout) -> tuple[Arrays, Arrays]:
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0, ranks_per_node=layout.ranks_per_node)
    start = placement_for(layout)
    plain, replicated = (ReplicatedRun(rank, layout, mesh, start, sequences=rank.world_size) for _ in range(2))
    replicated.replicate(*[of_both_groups(start)] * LAYERS)
    for number in range(2):
        plain.step(number)
        replicated.step(number)
    assert plain.pairs == replicated.pairs
    return plain.tensors(), replicated.tensors()


@pytest.mark.parametrize("layout", [
    Layout(4, 1, "uneven", replicas=True),
    full(Layout(4, 1, "uneven", "fsdp2", "block", overlap=True, chunks=2, replicas=True)),
    full(Layout(2, 2, "pinned", chunks=3, replicas=True)),
], ids=str)  # fmt: skip
def test_replicas_serve_ranks_without_tokens(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    """One rank has no token, one has no picture, and one has no text. With `uneven` one rank has no expert."""
    seen = run_in_world(layout.world_size, two_runs_with_an_empty_rank, layout)
    plain, replicated = (merged([each[run] for each in seen]) for run in range(2))
    torch.testing.assert_close(replicated, plain, rtol=0, atol=1e-9)
