"""Checks parts of the model: attention inside documents, the MoE layer on one and several ranks, and host syncs.

Shape letters: T tokens, D hidden size, B sequences, S positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.config.bundled import find_config
from moe_dist.config.load import load_config
from moe_dist.model.attention import attend, dense_mask, make_mask
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import ExpertGemm, Experts
from moe_dist.moe.kernel_choice import why_not_triton
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.parallel.own_model import build_moe_layer
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.build.dispatch import dispatch_context
from tools.gpu_check.kernels import difference
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.process import on_ranks

CONFIG = "adamoe_moma_small_1gpu"
MOST = {"fp32": 1e-5, "bf16": 0.03}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DISPATCH = (
    "kind: all_to_all",
    "kind: all_to_all, chunks: 3",
    "kind: all_to_all, overlap: true",
    "kind: hierarchical, ranks_per_node: 1",
    "kind: hierarchical, ranks_per_node: WORLD",
)
CASES = ("uneven tokens", "a rank without tokens", "all null", "one expert takes all")


def triton_or_none(device: torch.device, dtype: torch.dtype) -> RowKernels | None:
    if why_not_triton(device, dtype) is not None:
        return None
    from moe_dist.moe.kernels.triton_kernels import TRITON

    return TRITON


def single_group(experts: int, null: int, top_k: int, ffn: int) -> tuple[ExpertGroup, ...]:
    return (ExpertGroup("text", experts, null, top_k, ffn, 0, ("text",)),)


def make_layer(
    hidden: int,
    groups: Any,
    *,
    gemm: ExpertGemm = "auto",
    kernels: RowKernels = TORCH,
    mesh: Mesh | None = None,
    made_on: str | torch.device = "cpu",
) -> MoELayer:
    """Makes a layer with all experts or, with `mesh`, with the experts of a rank. The weights do not depend on the kernels.
    They are drawn on `made_on`: on the CPU they are equal for all GPU models, on a GPU drawing large weights is faster."""
    rank, ranks = (0, 1) if mesh is None else (mesh.rank, mesh.world_size)
    placement = ExpertPlacement.interleaved(groups, ranks)
    local = [len(placement.local_experts(rank, group)) for group in groups]
    wire = AllToAll(mesh.ep if mesh is not None and ranks > 1 else None, CommStats())
    with torch.device(made_on):
        layer = MoELayer(
            norm=nn.Identity(),
            router=TopKRouter(RouterContext(hidden, groups, kernels=kernels)),
            experts=Experts(hidden, groups, local, gemm=gemm, kernels=kernels),
            dispatcher=AllToAllDispatcher(DispatchContext(placement, wire, kernels=kernels)),
        )
    generator = torch.Generator(made_on).manual_seed(1 + rank)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, hidden**-0.5, generator=generator)
    return layer


def passes(layer: Any, x_TD: Tensor, group_T: Tensor, direction_TD: Tensor | None = None) -> list[Tensor]:
    """Returns the output [T, D], and the gradients of the input and of all weights. `direction_TD` is the gradient of the
    output; by default a gradient that is equal on any device."""
    x_TD = x_TD.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y_TD, _ = layer(x_TD, group_T)
    y_TD.backward(same_direction(y_TD) if direction_TD is None else direction_TD)
    grads = [parameter.grad for parameter in layer.parameters()]
    return [y_TD.detach(), *(each for each in (x_TD.grad, *grads) if each is not None)]


def same_direction(y_TD: Tensor) -> Tensor:
    """Returns a gradient for an output [T, D]. The gradient is equal on any device."""
    return torch.cos(torch.arange(y_TD.numel())).view(y_TD.shape).to(y_TD)  # CUDA's cos differs in the last bits


def layer(job: CheckJob) -> list[Reading]:
    """Measures how far an MoE layer differs from a float64 layer on the CPU, for each dtype, kernels and expert product."""
    device, (tokens, hidden, ffn) = torch.device(job.device), (48, 32, 24) if job.rehearse else (4096, 512, 768)
    groups, readings = single_group(8, 4, 3, ffn), []
    for precision, dtype in DTYPES.items():
        x_TD = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
        group_T = torch.zeros(tokens, dtype=torch.int64)
        group_T[-3:] = -1  # padding
        exact = passes(make_layer(hidden, groups).double(), x_TD.double(), group_T)
        triton = triton_or_none(device, dtype)
        for name, kernels in {"torch": TORCH, **({} if triton is None else {"Triton": triton})}.items():
            for gemm in ("loop", "auto"):
                made = make_layer(hidden, groups, gemm=gemm, kernels=kernels).to(device)
                found = passes(made, x_TD.to(device), group_T.to(device))
                worst = max(map(difference, found, exact))
                readings.append(Reading(f"{precision}, {name}, {gemm}: difference", worst, most=MOST[precision]))
    return readings


def dispatch(job: CheckJob) -> list[Reading]:
    """Compares an MoE layer on 2, 4, 8 and `job.gpus` ranks with the layer on one rank, for each dispatcher. Measures the
    largest relative difference. With `rehearse`, only two ranks are used. If there are fewer GPUs than ranks, ranks share
    GPUs and communicate over gloo."""
    worlds = [2] if job.rehearse else sorted({2, 4, 8, max(2, job.gpus)})
    found = [each for world in worlds for each in on_ranks(_dispatched, job, world=world)]
    return [Reading(f"{name}: difference", max(each[name] for each in found), most=1e-9) for name in found[0]]


def _dispatched(job: CheckJob, mesh: Mesh) -> dict[str, float]:
    """Compares each dispatcher in float64 with a layer that has all tokens on one rank. Returns the largest difference of
    outputs and gradients for each dispatcher."""
    hidden, groups = 16, single_group(2 * mesh.world_size, 2, 2, 24)
    worst: dict[str, float] = {}
    for kind in DISPATCH:
        text = kind.replace("WORLD", str(mesh.world_size))
        overrides = [f"parallel.ep={mesh.world_size}", f"parallel.dispatch={{{text}}}"]
        section = load_config(find_config(CONFIG), overrides).parallel
        size = section.dispatch.node_size
        own = (
            mesh
            if size is None
            else make_mesh(ep=mesh.world_size, device=mesh.device, timeout=job.seconds, ranks_per_node=size)
        )
        for case in CASES:
            tokens = [5 + 3 * rank for rank in range(mesh.world_size)]
            tokens[0] *= case != "a rank without tokens"
            inputs = [_input(rank, count, hidden) for rank, count in enumerate(tokens)]
            placement = ExpertPlacement.interleaved(groups, mesh.world_size)
            ours = build_moe_layer(hidden, groups, ep_group=own.ep, placement=placement, std=0.5)
            wire = AllToAll(own.ep, CommStats())
            nodes = (own.inter_node, own.intra_node)
            ours.dispatcher = section.dispatch.build(dispatch_context(section, placement, wire, hidden, nodes))
            alone = build_moe_layer(hidden, groups, std=0.5)
            for each in (ours, alone):
                _steer(each, case)
            device, own_TD = mesh.device, inputs[mesh.rank]
            made = passes(ours.double().to(device), own_TD.to(device), _groups(len(own_TD), device))
            exact = _exact(alone.double(), inputs, mesh.rank, placement.local_experts(mesh.rank, groups[0]))
            named = dict(zip(("y", "x", *(name for name, _ in ours.named_parameters())), made, strict=True))
            found = [difference(named[name], tensor) for name, tensor in exact.items()]
            print(f"rank {mesh.rank}, {kind}, {case}: {max(found):.3g}")
            worst[kind] = max(worst.get(kind, 0.0), *found)
    return worst


def _input(rank: int, tokens: int, hidden: int) -> Tensor:
    return torch.rand(tokens, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))  # positive


def _groups(tokens: int, device: Any = "cpu") -> Tensor:
    return torch.zeros(tokens, dtype=torch.int64, device=device)


@torch.no_grad()
def _steer(layer: MoELayer, case: str) -> None:
    """Changes the router so that all positive inputs choose only null experts, or null experts and the first expert."""
    if case in CASES[2:]:
        for name, rows in layer.router.named_parameters():
            rows.fill_(1.0 if name.endswith("null") else -1.0)
            if case == "one expert takes all" and name.endswith("true"):
                rows[0] = 2.0


def _exact(alone: MoELayer, inputs: Sequence[Tensor], rank: int, experts: Sequence[int]) -> dict[str, Tensor]:
    """Returns the right output and gradients of rank `rank`. Gradients of experts are sums over the tokens of all ranks."""
    sums: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for other, x_TD in enumerate(inputs):
        y_TD, x_grad, *grads = passes(alone, x_TD, _groups(len(x_TD)))
        if other == rank:
            exact = {"y": y_TD, "x": x_grad}
        for (name, _), grad in zip(alone.named_parameters(), grads, strict=True):
            if name.startswith("experts."):
                sums[name] = sums.get(name, torch.zeros_like(grad)) + grad
    return exact | {name: grad[list(experts)] for name, grad in sums.items()}


def attention(job: CheckJob) -> list[Reading]:
    """Checks grouped-query attention in packed documents, with and without a window. On CUDA flex attention is compiled."""
    device, readings = torch.device(job.device), []
    length, width = (48, 16) if job.rehearse else (1024, 64)
    generator = torch.Generator().manual_seed(3)
    documents_BS = (torch.rand(2, length, generator=generator) < 0.03).cumsum(1).to(torch.int32)
    starts = torch.where(documents_BS.diff(dim=1, prepend=documents_BS[:, :1] - 1) > 0, torch.arange(length), 0)
    positions_BS = torch.arange(length) - starts.cummax(1).values
    for precision, dtype in DTYPES.items():
        for window in (None, length // 4):
            drawn = [torch.randn(2, heads, length, width, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
            exact = _attended([each.double() for each in drawn], dense_mask(documents_BS, positions_BS, window))
            mask = make_mask(documents_BS.to(device), positions_BS.to(device), window)
            found = _attended([each.to(device) for each in drawn], mask)
            worst, most = max(map(difference, found, exact)), {"fp32": 1e-3, "bf16": 0.02}[precision]  # flex may use TF32
            readings.append(Reading(f"{precision}, window {window}: difference", worst, most=most))
    return readings


def _attended(drawn: list[Tensor], mask: Any) -> list[Tensor]:
    *qkv, direction = drawn
    q, k, v = (each.requires_grad_() for each in qkv)
    out = attend(q, k, v, mask)
    return [out, *torch.autograd.grad(out, (q, k, v), direction)]
