"""Small transformers on one device, with random weights so large that every part affects the results."""

from collections.abc import Callable
from typing import Any

import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.model.layers import ModelArgs, RMSNorm
from moe_dist.model.mixture_of_depths import DepthRouter
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.placement import ExpertPlacement
from tests.support.layouts import GROUPS

DIM = 16


def make_transformer(
    *,
    moe_layers: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 64,
    seed: int = 0,
    make_depths: Callable[[int], DepthRouter] | None = None,
    **args: Any,
) -> Transformer:
    """Returns three layers. Those in `moe_layers` have the groups of `layouts` with null experts, all others are dense."""
    placement = ExpertPlacement(GROUPS, (tuple(range(sum(group.num_experts for group in GROUPS))),))
    dispatcher = AllToAllDispatcher(DispatchContext(placement, AllToAll(None, CommStats(), None)))

    def make_moe(layer: int) -> MoELayer:
        return MoELayer(
            norm=RMSNorm(DIM, 1e-5),
            router=TopKRouter(RouterContext(DIM, GROUPS)),
            experts=Experts(DIM, GROUPS, [group.num_experts for group in GROUPS]),
            dispatcher=dispatcher,
            name=f"layers.{layer}",
        )

    sizes = ModelArgs(
        vocab_size=vocab_size,
        hidden_dim=DIM,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        moe_layers=moe_layers,
        dense_ffn_dim=24,
        compute_dtype=dtype,
        **args,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Transformer(sizes, make_moe, make_depths)
        initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=seed, std=0.3)
    finally:
        torch.set_default_dtype(before)
    return model
