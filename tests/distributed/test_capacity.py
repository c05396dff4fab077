"""Capacity on N ranks equals one process that drops within each rank's micro-batch, to 1e-10.

The layer has null, identity and constant experts and a selection bias. Some ranks have no tokens, or tokens of one
modality.
"""

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
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import ReferenceWeights, moe_forward
from tests.support.cover import full_unless
from tests.support.hf_families import gradients, load
from tests.support.worlds import RankContext

D = 6
GROUPS = (
    ExpertGroup("text", 4, 2, 4, 5, 0, ("text",), num_identity=2, num_constant=3),
    ExpertGroup("image", 3, 1, 2, 7, 4, ("image",), num_constant=1),
)
# Tokens of each rank, by world size. One rank has none; rank 1 has only text.
TOKENS = {1: (40,), 2: (23, 17), 4: (14, 11, 0, 15)}


def weights() -> dict[str, torch.Tensor]:
    """Returns random values of all parameters by logical name."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in GROUPS:
        rows = {"true": group.num_experts, "null": group.num_null}
        rows |= {"identity": group.num_identity, "constant": group.num_constant}
        shapes |= {f"router.{group.name}.{kind}": (count, D) for kind, count in rows.items() if count}
        shapes[f"router.{group.name}.bias"] = (group.num_columns,)
        shapes[f"free.{group.name}.vector"] = (group.num_constant, D)
        shapes[f"free.{group.name}.gate"] = (group.num_constant, 2, D)
        for expert in range(group.num_experts):
            prefix = f"experts.{group.name}.{expert}"
            shapes |= {f"{prefix}.gate": (group.ffn_dim, D), f"{prefix}.up": (group.ffn_dim, D)}
            shapes[f"{prefix}.down"] = (D, group.ffn_dim)
    return {name: torch.randn(shape, generator=generator, dtype=torch.double) for name, shape in shapes.items()}


def tokens_of(world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    h_TD = torch.randn(40, D, generator=generator, dtype=torch.double)
    h_TD[30:36] = h_TD[29]  # equal tokens tie when an expert is over its capacity
    group_T = torch.randint(-1, 2, (40,), generator=generator)
    if world_size > 1:
        group_T[TOKENS[world_size][0] :][: TOKENS[world_size][1]] = 0
    return h_TD, group_T, torch.randn(40, D, generator=generator, dtype=torch.double)


def run_layer(
    rank: RankContext, drop: str, recompute: str
) -> tuple[np.ndarray, np.ndarray, list[int], dict[str, np.ndarray]]:
    """Returns this rank's output, input gradient, dropped counts and parameter gradients."""
    size = rank.world_size
    mesh = make_mesh(ep=size, device=torch.device("cpu"), timeout=600.0)
    slots = tuple(tuple(range(7))[position::size] for position in range(size))
    placement = ExpertPlacement(GROUPS, slots)
    layer = MoELayer(
        norm=torch.nn.Identity(),
        router=TopKRouter(RouterContext(D, GROUPS, capacity=Capacity(0.6, drop)), selection_bias=True),  # pyright: ignore
        experts=Experts(D, GROUPS, [len(placement.local_experts(rank.rank, group)) for group in GROUPS]),
        dispatcher=AllToAllDispatcher(DispatchContext(placement, AllToAll(mesh.ep, CommStats()))),
        free=ZeroComputationExperts(D, GROUPS),
        recompute=recompute,  # pyright: ignore[reportArgumentType]
    ).double()
    load(layer, weights(), placement, rank.rank)
    h_TD, group_T, direction = (part.split(TOKENS[size])[rank.rank] for part in tokens_of(size))
    h_TD = h_TD.clone().requires_grad_()
    y_TD, report = layer(h_TD, group_T)
    (y_TD * direction).sum().backward()
    for name, parameter in layer.named_parameters():
        if not name.startswith("experts."):
            dist.all_reduce(parameter.grad)
    assert h_TD.grad is not None
    named = {name: grad.numpy() for name, grad in gradients(layer, placement, rank.rank).items()}
    return y_TD.detach().numpy(), h_TD.grad.numpy(), report.counts.dropped_LE[0].tolist(), named


def oracle(world_size: int, drop: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    named = {name: value.requires_grad_() for name, value in weights().items()}
    groups = {}
    for group in GROUPS:
        rows = {kind: named.get(f"router.{group.name}.{kind}") for kind in ("true", "null", "identity", "constant", "bias")}
        stacks = {
            part: torch.stack([named[f"experts.{group.name}.{e}.{part}"] for e in range(group.num_experts)])
            for part in ("gate", "up", "down")
        }
        free = {"vector": named[f"free.{group.name}.vector"], "mix": named[f"free.{group.name}.gate"]}
        groups[group.name] = ReferenceWeights(**rows, **stacks, **free)  # pyright: ignore[reportArgumentType]
    h_TD, group_T, direction = tokens_of(world_size)
    h_TD.requires_grad_()
    sets = [part.tolist() for part in torch.arange(40).split(TOKENS[world_size])]
    y_TD = moe_forward(h_TD, group_T.tolist(), GROUPS, groups, capacity=(0.6, drop), choice_sets=sets)
    (y_TD * direction).sum().backward()
    assert h_TD.grad is not None
    grads = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in named.items() if not n.endswith("bias")}
    return y_TD.detach().numpy(), h_TD.grad.numpy(), {name: grad.numpy() for name, grad in grads.items()}


@pytest.mark.parametrize(
    ("world_size", "drop", "recompute"),
    full_unless(
        lambda world_size, drop, recompute: world_size > 1 and (recompute == "block") == (world_size == 4),
        product([1, 2, 4], ["probability", "position"], ["none", "block"]),
    ),
)
def test_ranks_equal_one_process_over_the_same_sets(
    run_in_world: Callable[..., list[Any]], world_size: int, drop: str, recompute: str
) -> None:
    ranks = run_in_world(world_size, run_layer, drop, recompute)
    y_TD, dh_TD, named = oracle(world_size, drop)
    np.testing.assert_allclose(np.concatenate([y for y, *_ in ranks]), y_TD, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.concatenate([dh for _, dh, *_ in ranks]), dh_TD, rtol=0, atol=1e-10)
    together = {name: value for *_, grads in ranks for name, value in grads.items()}
    assert together.keys() == named.keys()
    for name, expected in named.items():
        np.testing.assert_allclose(together[name], expected, rtol=0, atol=1e-10, err_msg=name)
    assert sum(sum(dropped) for _, _, dropped, _ in ranks) > 0
