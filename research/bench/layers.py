"""Compares our MoE layer with Megatron-Core's. Times forward and backward of a single layer, and training steps of the
default model.

Both layers have equal weights and routing. Before the timing, their outputs, gradients and losses are compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.config.bundled import source_root
from moe_dist.config.load import load_config
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.build.dispatch import dispatch_context
from moe_dist.train.objective.loss import AuxSettings
from research.bench.measure import Effort, measured_row
from research.bench.megatron_variants import variants
from research.bench.points import Point, slots
from research.gpu_bench.megatron_core import MegatronMoE, copy_experts
from research.gpu_bench.megatron_step import LEARNING_RATE, random_batches, training_step

DEFAULT_JOB = source_root() / "configs" / "adamoe_moma_tiny_cpu.yaml"


@dataclass(frozen=True)
class LayerSize:
    """The sizes of an MoE layer and its input."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    null: bool  # true: as many null as true experts, and twice the top_k, so that about half of the choices are null


LAYERS: Mapping[str, LayerSize] = {
    "1024 x 512, FFN 512, top-2 of 8": LayerSize(1024, 512, 512, 8, 2, False),
    "4096 x 512, FFN 256, top-2 of 16": LayerSize(4096, 512, 256, 16, 2, False),
    "4096 x 512, FFN 256, top-4 of 16 + 16 null": LayerSize(4096, 512, 256, 16, 2, True),
}
QUICK_LAYERS: Mapping[str, LayerSize] = {
    "quick": LayerSize(32, 16, 8, 8, 2, False),
    "quick, null": LayerSize(32, 16, 8, 8, 2, True),
}


def measure_layer(size: LayerSize, mesh: Mesh, effort: Effort) -> dict[str, Any]:
    """Times forward and backward of our layer, and of each variant of Megatron-Core's layer."""
    group = ExpertGroup("all", size.experts, size.experts * size.null, size.top_k * (1 + size.null), size.ffn, 0, ("text",))
    placement = ExpertPlacement((group,), slots(Point(experts=size.experts), mesh.ep_size))
    generator = torch.Generator().manual_seed(effort.seed)  # the same seed on all ranks, so that all draw the same router
    ours = _our_layer(group, placement, size.hidden, mesh, generator)
    rivals = {
        name: MegatronMoE(nn.Identity(), ours.router, placement, variant, hidden=size.hidden, ep_rank=mesh.ep_rank)
        for name, variant in variants(nulls=size.null).items()
    }
    for rival in rivals.values():
        copy_experts(ours.experts, rival.experts)
    own = torch.Generator().manual_seed(effort.seed + 1 + mesh.rank)
    x_TD, direction_TD = (torch.randn(size.tokens, size.hidden, generator=own) for _ in range(2))
    x_TD.requires_grad_()
    contenders = {name: _pass(module, x_TD, direction_TD) for name, module in {"ours": ours, **rivals}.items()}
    results = {name: run() for name, run in contenders.items()}
    for name, (y_TD, gradient_TD) in results.items():
        torch.testing.assert_close(y_TD, results["ours"][0], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(gradient_TD, results["ours"][1], rtol=1e-3, atol=1e-4)
    pairs = [("ours", name) for name in rivals]
    return measured_row(contenders, mesh, effort, hidden=size.hidden, point=asdict(size), pairs=pairs)


def _our_layer(
    group: ExpertGroup, placement: ExpertPlacement, hidden: int, mesh: Mesh, generator: torch.Generator
) -> MoELayer:
    section = load_config(DEFAULT_JOB, []).parallel
    layer = MoELayer(
        norm=nn.Identity(),
        router=TopKRouter(RouterContext(hidden, placement.groups)),
        experts=Experts(hidden, placement.groups, [len(placement.local_experts(mesh.ep_rank, group))]),
        dispatcher=section.dispatch.build(dispatch_context(section, placement, AllToAll(mesh.ep, CommStats()), hidden)),
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, hidden**-0.5, generator=generator)
    return layer


def _pass(module: nn.Module, x_TD: Tensor, direction_TD: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes a function that runs forward and backward, and returns the output and the input's gradient."""
    group_T = torch.zeros(x_TD.shape[0], dtype=torch.int64)

    def run() -> tuple[Tensor, Tensor]:
        x_TD.grad = None
        module.zero_grad(set_to_none=True)
        y_TD, _ = module(x_TD, group_T)
        y_TD.backward(direction_TD)
        assert x_TD.grad is not None
        return y_TD.detach(), x_TD.grad

    return run


def measure_step(mesh: Mesh, effort: Effort) -> dict[str, Any]:
    """Times training steps of the default job's model with 8 null experts per group on random tokens, once with our MoE
    layers, and once with Megatron-Core's MoE layers. Both kinds of steps use the same attention, router, loss, gradient
    reduction and optimizer."""
    half = mesh.ep_size // 2  # the default job pins text to the first half of the ranks and image to the second half
    text, image = list(range(half)), list(range(half, mesh.ep_size))
    groups = f"placement.groups={{text: {{ranks: {text}}}, image: {{ranks: {image}}}}}"
    nulls = [f"model.moe.groups.{name}.num_null=8" for name in ("text", "image")]  # half of the choices are null
    changes = [f"parallel.ep={mesh.ep_size}", groups, *nulls, "model.moe.router.normalise=true_chosen"]
    config = load_config(DEFAULT_JOB, changes)
    batches = random_batches(config, mesh, effort.seed)
    steps = {
        "ours": training_step(config, mesh, None),
        **{name: training_step(config, mesh, variant) for name, variant in variants(nulls=True).items()},
    }
    aux = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)
    contenders = {name: (lambda step=step: step(batches, lr=LEARNING_RATE, aux=aux)) for name, step in steps.items()}
    results = {name: run() for name, run in contenders.items()}
    for name, result in results.items():
        np.testing.assert_allclose(result.nll_M, results["ours"].nll_M, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(result.grad_norm, results["ours"].grad_norm, rtol=1e-3, err_msg=name)
    shape = {"tokens of a rank": sum(batch.tokens_BS.numel() for batch in batches), "config": DEFAULT_JOB.name}
    pairs = [("ours", name) for name in steps if name != "ours"]
    return measured_row(contenders, mesh, effort, hidden=config.model.hidden_dim, point=shape, pairs=pairs)
