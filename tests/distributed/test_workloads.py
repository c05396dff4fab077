"""The workloads W0 to W7 on real ranks: output, gradients and traffic of a layer against a loop over tokens.
test_n_ranks_equal_one.py takes steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import ReferenceWeights, expected_node_traffic, expected_traffic, moe_forward
from tests.reference.workloads import hidden_states, router_weight
from tests.support.cover import exhaustive, full
from tests.support.worlds import RankContext
from tools.gpu_check.token_imbalance import (
    WORKLOADS,
    WorkloadShape,
    WorkloadStep,
    workload_step,
)

E, K, D, F, T = 8, 2, 10, 3, 40
GROUP = ExpertGroup("all", E, 0, K, F, 0, ("text",))
STEPS = (3, 4, 5)  # include the start of W7's burst, and three places of W6's hot spot


@dataclass(frozen=True)
class Ranks:
    """One rank's position, with a dispatcher over all ranks."""

    rank: int
    shape: WorkloadShape
    placement: ExpertPlacement
    dispatcher: Dispatcher[Any]
    comm_stats: CommStats
    group: Any
    per_node: int | None

    @classmethod
    def of(cls, context: RankContext, kind: str) -> "Ranks":
        world = context.world_size
        per_node = {"all_to_all": None, "hierarchical": max(1, world // 2)}[kind]
        mesh = make_mesh(ep=world, device=torch.device("cpu"), timeout=600.0, ranks_per_node=per_node)
        shape = WorkloadShape(T, E, K, world)
        placement = ExpertPlacement((GROUP,), tuple(tuple(shape.shard(rank)) for rank in range(world)))
        comm_stats = CommStats()
        dispatcher: Dispatcher[Any] = AllToAllDispatcher(DispatchContext(placement, AllToAll(mesh.ep, comm_stats)))
        if per_node is not None:
            between, inside = (
                AllToAll(mesh.inter_node, comm_stats, between_nodes=True),
                AllToAll(mesh.intra_node, comm_stats),
            )
            dispatcher = HierarchicalDispatcher(
                DispatchContext(placement, between, hops=(between, inside)), ranks_per_node=per_node
            )
        return cls(context.rank, shape, placement, dispatcher, comm_stats, mesh.world, per_node)

    def step(self, workload: str, number: int) -> WorkloadStep:
        return workload_step(workload, seed=0, step=number, shape=self.shape)

    def rows_sent(self, step: WorkloadStep) -> tuple[int, int]:
        """Returns the closed form of this rank's sent rows: all, and between nodes."""
        sources = [step.expert_TK[step.rows_of(source)] for source in range(self.shape.num_shards)]
        tokens = [np.arange(len(each)).repeat(K).tolist() for each in sources]
        experts = [each.ravel().tolist() for each in sources]
        rank_of = self.placement.rank_of_expert
        if self.per_node is None:
            return expected_traffic(tokens[self.rank], experts[self.rank], rank_of, self.rank)[0], 0
        between, inside = expected_node_traffic(tokens, experts, rank_of, ranks_per_node=self.per_node, own_rank=self.rank)
        return between + inside, between

    def check_traffic(self, step: WorkloadStep, sent: int) -> None:
        """Compares rows and bytes of a forward and backward with the closed form."""
        rows, between = self.rows_sent(step)
        assert sent == rows
        total = torch.tensor([rows, between, self.comm_stats.payload_bytes, self.comm_stats.inter_node_bytes])
        dist.all_reduce(total, group=self.group)
        rows, between, payload, payload_between = total.tolist()
        assert (payload, payload_between) == (4 * rows * D * 8, 4 * between * D * 8)


class Pair:
    """A layer over the ranks, and the weights of the one process to compare with."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.local = list(ranks.placement.slots[ranks.rank])
        self.layer = MoELayer(
            norm=torch.nn.Identity(),
            router=TopKRouter(RouterContext(D, [GROUP])),
            experts=Experts(D, [GROUP], [len(self.local)]),
            dispatcher=ranks.dispatcher,
        ).double()
        generator = torch.Generator().manual_seed(7)
        shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
        self.whole = {"router": torch.from_numpy(router_weight(E, D))}
        self.whole |= {k: torch.randn(s, dtype=torch.double, generator=generator) * 0.5 for k, s in shapes.items()}
        for name, value in self.whole.items():
            value.requires_grad_()
            with torch.no_grad():
                self.parameter(name).copy_(self.part(name, value))

    def parameter(self, name: str) -> torch.nn.Parameter:
        where = "router.group:all.true" if name == "router" else f"experts.group:all.{name}"
        return self.layer.get_parameter(where)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of a whole tensor."""
        return whole if name == "router" else whole[self.local]

    def pass_through(self, step: WorkloadStep, number: int) -> None:
        """Runs forward and backward of both, and compares output and input gradient. Leaves gradients on the parameters."""
        h_TD = torch.from_numpy(hidden_states(step, num_experts=E, hidden_dim=D, seed=number))
        direction = torch.randn(h_TD.shape, dtype=torch.double, generator=torch.Generator().manual_seed(number))
        rows = step.rows_of(self.ranks.rank)
        mine = h_TD[rows].clone().requires_grad_()
        self.ranks.comm_stats.take()
        y_TD, report = self.layer(mine, torch.zeros(len(mine), dtype=torch.int64))
        (y_TD * direction[rows]).sum().backward()
        assert report.sent.pairs == len(mine) * K
        self.ranks.check_traffic(step, report.sent.rows_remote)
        dist.all_reduce(self.parameter("router").grad, group=self.ranks.group)

        weights = ReferenceWeights(self.whole["router"], None, *(self.whole[k] for k in ("gate", "up", "down")))
        h_TD.requires_grad_()
        expected = moe_forward(h_TD, [0] * len(h_TD), [GROUP], {"all": weights})
        (expected * direction).sum().backward()
        torch.testing.assert_close(y_TD, expected[rows], rtol=0, atol=1e-11)
        assert h_TD.grad is not None
        torch.testing.assert_close(mine.grad, h_TD.grad[rows], rtol=0, atol=1e-11)
        counts = np.bincount(step.expert_TK.ravel(), minlength=E)
        choices = report.counts.choices_LC[0].clone()
        dist.all_reduce(choices, group=self.ranks.group)
        assert choices.tolist() == counts.tolist(), "the router chose another workload"


def passed(context: RankContext, kind: str) -> dict[str, int]:
    """Checks outputs, gradients and traffic. Returns the rows that this rank's experts computed in each workload."""
    ranks, seen = Ranks.of(context, kind), {}
    for workload in WORKLOADS:
        for number in STEPS:
            pair, step = Pair(ranks), ranks.step(workload, number)
            pair.pass_through(step, number)
            for name, whole in pair.whole.items():
                grad = pair.parameter(name).grad
                assert grad is not None, f"{name} has no gradient"
                assert whole.grad is not None
                torch.testing.assert_close(grad, pair.part(name, whole.grad), rtol=0, atol=1e-11)
            seen[workload] = int(np.isin(step.expert_TK, pair.local).sum())
    return seen


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("all_to_all", 4), full("hierarchical", 4), exhaustive("all_to_all", 2), exhaustive("hierarchical", 2)],
)
def test_all_eight_pass_and_none_hangs(run_in_world: Callable[..., list[Any]], world_size: int, kind: str) -> None:
    seen = run_in_world(world_size, passed, kind)
    for each in seen:
        assert list(each) == list(WORKLOADS), "all eight are reported, never a subset"
    # W5 must leave a rank without pairs, and W2 must give one rank the most.
    assert min(each["W5"] for each in seen) == 0
    assert max(each["W2"] for each in seen) > T * K / world_size
