"""A MoE block equals Hugging Face's own block in fp32 with random weights: output and all gradients, on EP 1, 2 and 4.

test_hf_import.py tests whole models through a real import.

Tensors agree if no entry differs by more than 1e-5 of the largest entry. Weights have a standard deviation of 0.2, and
norms are near 1, so activations are of order 1. The smallest gap at the k-th choice is asserted, because rounding must not
decide a choice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.model.layers import SwiGLU
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.agreement import SMALLEST_GAP, Arrays, arrays, assert_agree, merged, smallest_gap
from tests.support.cover import full
from tests.support.hf_families import ERNIE_BLOCK, gradients, load, to_logical
from tests.support.tiny_hf import HIDDEN_DIM, draw
from tests.support.worlds import RankContext

D = HIDDEN_DIM


def our_block(
    rank: RankContext, groups: tuple[ExpertGroup, ...], options: dict[str, Any], weights: Arrays, batch: Arrays
) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """Returns the output and input gradient of this rank's tokens, and the gradients of its parameters."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    slots: list[list[int]] = [[] for _ in range(rank.world_size)]
    for expert in range(sum(group.num_experts for group in groups)):
        slots[expert % rank.world_size].append(expert)
    placement = ExpertPlacement(groups, tuple(map(tuple, slots)))
    shared_dim = options["shared_ffn_dim"]
    layer = MoELayer(
        norm=nn.Identity(),
        router=TopKRouter(RouterContext(D, groups), **options["router"]),
        experts=Experts(D, groups, [len(placement.local_experts(rank.rank, group)) for group in groups]),
        dispatcher=AllToAllDispatcher(DispatchContext(placement, AllToAll(mesh.ep, CommStats()))),
        shared=SwiGLU(D, shared_dim) if shared_dim else None,
    )
    load(layer, {name: torch.from_numpy(value) for name, value in weights.items()}, placement, rank.rank)
    h_TD, group_T, direction = (
        torch.from_numpy(np.array_split(batch[name], rank.world_size)[rank.rank]) for name in ("h", "group", "direction")
    )
    h_TD.requires_grad_()
    y_TD, _ = layer(h_TD, group_T)
    (y_TD * direction).sum().backward()
    for name, parameter in layer.named_parameters():
        if not name.startswith("experts."):
            dist.all_reduce(parameter.grad)
    assert h_TD.grad is not None
    return y_TD.detach().numpy(), h_TD.grad.numpy(), arrays(gradients(layer, placement, rank.rank))


def ernie() -> tuple[nn.Module, tuple[ExpertGroup, ...], dict[str, Any]]:
    """Ernie 4.5 VL has text and image experts of different widths, a router and bias for each, and shared experts."""
    from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock

    config = Ernie4_5_VLMoeTextConfig(
        hidden_size=D, moe_intermediate_size=[24, 12], moe_num_experts=6, moe_k=3, moe_num_shared_experts=2
    )
    config._experts_implementation = "eager"
    groups = (ExpertGroup("text", 6, 0, 3, 24, 0, ("text",)), ExpertGroup("image", 6, 0, 3, 12, 6, ("image",)))
    return Ernie4_5_VLMoeMoeBlock(config), groups, {"router": {"selection_bias": True}, "shared_ffn_dim": 48}


@pytest.mark.parametrize("ep", [1, full(2), 4])
def test_blocks(run_in_world: Callable[..., list[Any]], ep: int) -> None:
    (theirs, groups, options), rules = ernie(), ERNIE_BLOCK
    draw(theirs, seed=2)
    group_T = torch.from_numpy(np.random.default_rng(3).integers(0, len(groups), 40))
    h_TD = torch.randn(40, D).requires_grad_()
    direction = torch.randn(40, D)
    state = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    weights = to_logical(state, rules, groups)
    for index, group in enumerate(groups):
        rows = weights[f"router.{group.name}.true"]
        scores = (h_TD[group_T == index] @ rows.T).softmax(-1) + weights[f"router.{group.name}.bias"]
        assert smallest_gap(scores, group.top_k) > SMALLEST_GAP
    out = theirs(h_TD[None], group_T[None])[0]
    (out[0] * direction).sum().backward()
    assert h_TD.grad is not None
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    batch = {"h": h_TD.detach().numpy(), "group": group_T.numpy(), "direction": direction.numpy()}
    ranks = run_in_world(ep, our_block, groups, options, arrays(weights), batch)
    assert_agree(
        {"y": np.concatenate([y for y, _, _ in ranks]), "dh": np.concatenate([dh for _, dh, _ in ranks])},
        {"y": out[0].detach().numpy(), "dh": h_TD.grad.numpy()},
    )
    assert_agree(merged([each for _, _, each in ranks]), arrays(to_logical(named, rules, groups)))
