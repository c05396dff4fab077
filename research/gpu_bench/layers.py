"""Compares the time of our MoE layer with the times of other layers, in OLMoE's size. Two of these layers consist of
torch's operations. The first makes a row for each (token, expert) pair and sorts the rows by expert, as torchtitan's layer
does on one rank. The second computes one expert after the other. Layers with the experts of Hugging Face and of ScatterMoE
are compared, too, if their packages are installed. The layer of Megatron-Core has a separate check.

Shape letters: T tokens, N (token, expert) pairs, D hidden size, E experts, K choices of a token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from moe_dist.moe.experts.experts import ExpertStack
from moe_dist.moe.experts.products import why_not_grouped
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertPlacement
from research.gpu_bench.ceilings import drawn, seconds_of, sizes
from research.gpu_bench.megatron_core import MegatronMoE, Variant, copy_experts
from research.gpu_bench.rates import bf16_layer
from tools.gpu_check.kernels import difference
from tools.gpu_check.layers import make_layer, passes, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks

MOST = 2e-2  # largest relative difference of outputs and of input gradients between two layers in bf16


class SortedPairs(nn.Module):
    """A layer that makes a row for each (token, expert) pair and sorts the rows by expert. It has the router and the
    weights of `like`, which must have one group and no null experts."""

    def __init__(self, like: MoELayer) -> None:
        super().__init__()
        self.router, self.stack = like.router, _stack(like)

    def forward(self, x_TD: Tensor, group_T: Tensor) -> tuple[Tensor, None]:
        pairs = self.router(x_TD, group_T).assignments
        gate, up, down = (self.stack.weight(name, x_TD.dtype).transpose(-2, -1) for name in ("gate", "up", "down"))
        order_N = pairs.expert_N.argsort(stable=True)
        ends_E = torch.bincount(pairs.expert_N, minlength=len(down)).cumsum(0).to(torch.int32)
        token_N = pairs.token_N[order_N]
        x_ND = x_TD[token_N]
        hidden = F.silu(F.grouped_mm(x_ND, gate, offs=ends_E)) * F.grouped_mm(x_ND, up, offs=ends_E)
        y_ND = F.grouped_mm(hidden, down, offs=ends_E).float() * pairs.weight_N[order_N, None]
        return torch.zeros_like(x_TD).index_add(0, token_N, y_ND.to(x_TD.dtype)), None


class OtherExperts(nn.Module):
    """A layer with the router of `like` and other experts. `make` turns the experts of `like` into a function of the
    tokens [T, D], and of the indices and weights of the chosen experts [T, K]."""

    def __init__(self, like: MoELayer, make: Callable[[ExpertStack], Callable[..., Tensor]]) -> None:
        super().__init__()
        self.router, self.run = like.router, make(_stack(like))

    def forward(self, x_TD: Tensor, group_T: Tensor) -> tuple[Tensor, None]:
        pairs = self.router(x_TD, group_T).assignments
        return self.run(x_TD, pairs.expert_N.view(len(x_TD), -1), pairs.weight_N.view(len(x_TD), -1)), None


def hugging_face(stack: ExpertStack) -> Callable[..., Tensor]:
    from transformers.integrations.moe import grouped_mm_experts_forward  # works without CUDA
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    experts, (hidden, ffn) = len(stack.gate), stack.widths
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=ffn, num_experts=experts)
    theirs: Any = OlmoeExperts(config).to(stack.gate)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.cat([stack.gate, stack.up], 1))
        theirs.down_proj.copy_(stack.down)
    return lambda *args: grouped_mm_experts_forward(theirs, *args)


def scatter_moe(stack: ExpertStack) -> Callable[..., Tensor]:
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    def run(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        theirs.top_k = expert_TK.shape[1]
        return theirs(x_TD, weight_TK.to(x_TD.dtype), expert_TK)

    hidden, ffn = stack.widths
    theirs: Any = GLUMLP(hidden, ffn, len(stack.gate), len(stack.gate), activation=nn.SiLU()).to(stack.gate)
    with torch.no_grad():
        theirs.experts.weight.copy_(torch.cat([stack.up, stack.gate], 1))
        theirs.output_experts.weight.copy_(stack.down)
    return run


PACKAGED = {"Hugging Face's grouped product": hugging_face, "ScatterMoE": scatter_moe}


def _stack(like: MoELayer) -> ExpertStack:
    ((name, _),) = like.experts.local
    return like.experts.stack(name)


def _layer(job: CheckJob, kernels: RowKernels, *, loop: bool = False) -> MoELayer:
    _, D, width, E, K = sizes(job)
    made = make_layer(D, single_group(E, 0, K, width), gemm="loop" if loop else "auto", kernels=kernels).to(job.device)
    made.experts.to(torch.bfloat16)
    return made


def rivals(job: CheckJob) -> list[Reading]:
    """Times forward and backward of all layers. Raises NotPossibleError without grouped products."""
    T, D, width, *_ = sizes(job)
    device = torch.device(job.device)
    if reason := why_not_grouped(torch.bfloat16, device, (D, width)):
        raise NotPossibleError(reason)
    ours = _layer(job, triton_or_none(device, torch.bfloat16) or TORCH)
    others: dict[str, nn.Module] = {
        "sorted pairs": SortedPairs(_layer(job, TORCH)),
        "a loop over experts": _layer(job, TORCH, loop=True),
    }
    for name, make in PACKAGED.items():
        try:
            others[name] = OtherExperts(_layer(job, TORCH), make)
        except ImportError as error:
            print(f"{name} is not measured: {error}")
    x_TD, group_T = drawn(job, T, D), torch.zeros(T, dtype=torch.int64, device=device)
    expected, seconds = passes(ours, x_TD, group_T, x_TD), seconds_of(job, lambda: passes(ours, x_TD, group_T, x_TD))
    readings = []
    for name, layer in others.items():
        found = passes(layer, x_TD, group_T, x_TD)
        apart = max(difference(each, other) for each, other in zip(found[:2], expected[:2], strict=True))
        readings.append(Reading(f"{name}: output and gradient of the input, apart", apart, most=MOST))
        theirs = seconds_of(job, lambda layer=layer: passes(layer, x_TD, group_T, x_TD))
        readings.append(job.timed(f"ours / {name}", seconds / theirs, most=1.0))
    return readings


def megatron_layer(job: CheckJob) -> list[Reading]:
    """Times forward and backward of our layer and of Megatron-Core's. Raises NotPossibleError if Megatron-Core is missing
    or fails on the GPU, because that is no fault of moe_dist."""
    found = on_ranks(_megatron_seconds, job, world=1)[0]
    if isinstance(found, str):
        raise NotPossibleError(found)
    return [job.timed("ours / Megatron-Core's sequential experts", found, most=1.0)]


def _megatron_seconds(job: CheckJob, mesh: Mesh) -> float | str:
    """Returns the ratio of times, or the reason why Megatron-Core cannot be measured."""
    T, D, width, E, K = sizes(job)
    groups = single_group(E, 0, K, width)
    x_TD, group_T = drawn(job, T, D), torch.zeros(T, dtype=torch.int64, device=mesh.device)
    ours, placement = bf16_layer(D, groups, mesh.device), ExpertPlacement.interleaved(groups, 1)
    seconds = seconds_of(job, lambda: passes(ours, x_TD, group_T, x_TD))
    try:
        with megatron_on_cpu() if job.rehearse else nullcontext(), model_parallel(), mesh.device:
            theirs = MegatronMoE(nn.Identity(), ours.router, placement, Variant(), hidden=D, ep_rank=0).to(mesh.device)
            copy_experts(ours.experts, theirs.experts)
            theirs.experts.to(torch.bfloat16)
            return seconds / seconds_of(job, lambda: passes(theirs, x_TD, group_T, x_TD))
    except Exception as error:
        if job.rehearse and not isinstance(error, ImportError):
            raise
        return f"{type(error).__name__}: {error}"
