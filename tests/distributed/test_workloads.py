"""Under the workloads W0 to W7, a layer on real ranks has the output, gradients and traffic of a loop over tokens.
test_n_ranks_equal_one.py takes training steps."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import ReferenceWeights, expected_traffic, moe_forward
from tests.reference.workloads import hidden_states, router_weight
from tests.support.cover import exhaustive, full
from tests.support.worlds import RankContext
from tools.gpu_check.token_imbalance import WORKLOADS, WorkloadShape, workload_step

E, K, D, F, T = 8, 2, 10, 3, 40
GROUP = ExpertGroup("all", E, 0, K, F, 0, ("text",))
STEPS = (3, 4, 5)  # these steps include the start of W7's burst, and three positions of W6's hot spot
STACKS = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}


def layer_with(whole: dict[str, torch.Tensor], placement: ExpertPlacement, wire: AllToAll, local: list[int]) -> MoELayer:
    """Returns a rank's layer, with this rank's part of the weights."""
    layer = MoELayer(
        norm=torch.nn.Identity(),
        router=TopKRouter(RouterContext(D, [GROUP])),
        experts=Experts(D, [GROUP], [len(local)]),
        dispatcher=AllToAllDispatcher(DispatchContext(placement, wire)),
    ).double()
    with torch.no_grad():
        for name, weight in whole.items():
            parameter_of(layer, name).copy_(part_of(name, weight, local))
    return layer


def parameter_of(layer: MoELayer, name: str) -> torch.nn.Parameter:
    return layer.get_parameter("router.group:all.true" if name == "router" else f"experts.group:all.{name}")


def part_of(name: str, whole: torch.Tensor, local: list[int]) -> torch.Tensor:
    return whole if name == "router" else whole[local]


def passed(context: RankContext) -> dict[str, int]:
    """Compares outputs, gradients and traffic with the loop. Returns this rank's computed pairs in each workload."""
    mesh = make_mesh(ep=context.world_size, device=torch.device("cpu"), timeout=600.0)
    shape = WorkloadShape(T, E, K, context.world_size)
    placement = ExpertPlacement((GROUP,), tuple(tuple(shape.shard(rank)) for rank in range(context.world_size)))
    wire, local, seen = AllToAll(mesh.ep, CommStats()), list(placement.slots[context.rank]), dict[str, int]()
    generator = torch.Generator().manual_seed(7)
    whole = {"router": torch.from_numpy(router_weight(E, D))}
    whole |= {name: torch.randn(size, dtype=torch.double, generator=generator) * 0.5 for name, size in STACKS.items()}
    for workload, number in product(WORKLOADS, STEPS):
        step = workload_step(workload, seed=0, step=number, shape=shape)
        h_TD = torch.from_numpy(hidden_states(step, num_experts=E, hidden_dim=D, seed=number)).requires_grad_()
        direction = torch.randn(h_TD.shape, dtype=torch.double, generator=torch.Generator().manual_seed(number))
        weights = {name: weight.clone().requires_grad_() for name, weight in whole.items()}
        reference = ReferenceWeights(weights["router"], None, *(weights[name] for name in STACKS))
        expected = moe_forward(h_TD, [0] * len(h_TD), [GROUP], {"all": reference})
        (expected * direction).sum().backward()
        assert h_TD.grad is not None

        layer, rows = layer_with(whole, placement, wire, local), step.rows_of(context.rank)
        mine = h_TD.detach()[rows].clone().requires_grad_()
        wire.comm_stats.take()
        y_TD, report = layer(mine, torch.zeros(len(mine), dtype=torch.int64))
        (y_TD * direction[rows]).sum().backward()
        torch.testing.assert_close(y_TD, expected[rows], rtol=0, atol=1e-11)
        torch.testing.assert_close(mine.grad, h_TD.grad[rows], rtol=0, atol=1e-11)
        dist.all_reduce(parameter_of(layer, "router").grad, group=mesh.world)
        for name, weight in weights.items():
            assert weight.grad is not None
            torch.testing.assert_close(
                parameter_of(layer, name).grad, part_of(name, weight.grad, local), rtol=0, atol=1e-11
            )

        chosen_TK = step.expert_TK[rows]
        tokens, experts = np.arange(len(chosen_TK)).repeat(K).tolist(), chosen_TK.ravel().tolist()
        sent = expected_traffic(tokens, experts, placement.rank_of_expert, context.rank)[0]
        assert (report.sent.rows_remote, report.sent.pairs) == (sent, len(chosen_TK) * K)
        total = torch.tensor([sent, wire.comm_stats.payload_bytes])
        dist.all_reduce(total, group=mesh.world)
        assert total[1] == 4 * total[0] * D * 8
        counts = np.bincount(experts, minlength=E).tolist()
        assert report.counts.choices_LC[0].tolist() == counts, "the router chose another workload"
        seen[workload] = int(np.isin(step.expert_TK, local).sum())
    return seen


@pytest.mark.parametrize("world_size", [full(4), exhaustive(2)])
def test_all_eight_pass_and_none_hangs(run_in_world: Callable[..., list[Any]], world_size: int) -> None:
    seen = run_in_world(world_size, passed)
    for each in seen:
        assert list(each) == list(WORKLOADS), "all eight are reported, never a subset"
    # W5 must leave one rank without pairs, and W2 must give one rank more pairs than an even share.
    assert min(each["W5"] for each in seen) == 0
    assert max(each["W2"] for each in seen) > T * K / world_size
