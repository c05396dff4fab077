"""Checks an MoE layer under the workloads W0 to W7."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.routing.types import Assignments
from research.gpu_bench.ceilings import seconds_of, sizes
from research.gpu_bench.token_imbalance import WORKLOADS, WorkloadShape, WorkloadStep, workload_step
from tools.gpu_check.kernels import difference
from tools.gpu_check.layers import MOST, make_layer, same_direction, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, Reading

STEPS = {"W6": (0, 1), "W7": (3, 4)}  # steps to check, between which the hot experts change; other workloads use step 0


def workloads(job: CheckJob) -> list[Reading]:
    """Compares bf16 outputs and gradients under each workload with float64 on the CPU, and measures the largest relative
    difference. Measures the time at the size of an OLMoE layer. Also measures the allocator's reserved / allocated memory
    at the peak over all workloads."""
    tokens, experts, widths = (32, 8, (16, 8)) if job.rehearse else (4096, 64, (256, 128))
    shape, device = WorkloadShape(tokens, experts, top_k=4, num_shards=4), torch.device(job.device)
    kernels, readings = triton_or_none(device, torch.bfloat16) or TORCH, []
    T, D, F, E, K = sizes(job)
    timed = WorkloadShape(T, E, K, num_shards=4)
    for name in WORKLOADS:
        worst, seconds = 0.0, []
        for step in STEPS.get(name, (0,)):
            drawn = workload_step(name, seed=0, step=step, shape=shape)
            exact = _passes(shape, widths, drawn, TORCH, (torch.device("cpu"), torch.float64))()
            found = _passes(shape, widths, drawn, kernels, (device, torch.bfloat16))()
            worst = max([worst, *map(difference, found, exact)])
            large = workload_step(name, seed=0, step=step, shape=timed)
            run = _passes(timed, (D, F), large, kernels, (device, torch.bfloat16), made_on=device)
            seconds.append(seconds_of(job, run))
        readings.append(Reading(f"{name}: difference", worst, most=MOST["bf16"]))
        readings.append(job.timed(f"{name}: forward and backward of an OLMoE layer", max(seconds) * 1e3, "ms"))
    if not job.rehearse:
        reserved = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
        readings.append(Reading("memory: reserved / allocated at the peak", reserved, most=1.1))
    return readings


def _passes(
    shape: WorkloadShape,
    widths: tuple[int, int],
    drawn: WorkloadStep,
    kernels: RowKernels,
    where: tuple[torch.device, torch.dtype],
    made_on: str | torch.device = "cpu",
) -> Callable[[], list[Tensor]]:
    """Makes a function that plans and runs dispatch, experts and combine for the expert choices `drawn`. The function
    returns the output, and the gradients of tokens, weights and experts."""
    (hidden, ffn), (device, dtype), tokens, top_k = widths, where, shape.num_tokens, shape.top_k
    groups = single_group(shape.num_experts, 0, top_k, ffn)
    layer = make_layer(hidden, groups, kernels=kernels, made_on=made_on).to(device, dtype)
    h_TD = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    h_TD = h_TD.to(device, dtype).requires_grad_()
    expert_N, weight_N = (torch.from_numpy(each).flatten() for each in (drawn.expert_TK, drawn.weight_TK))
    weight_N = weight_N.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    token_N = torch.arange(tokens, device=device).repeat_interleave(top_k)
    pairs = Assignments(token_N, expert_N.to(device), weight_N, num_choices=top_k)
    direction_TD = same_direction(h_TD)

    def run() -> list[Tensor]:
        plan = layer.dispatcher.plan(pairs, tokens)
        y_TD, _ = layer.dispatcher.run(h_TD, weight_N, plan, experts=layer.experts)
        leaves = [h_TD, weight_N, *layer.experts.parameters()]
        return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, direction_TD)]

    return run
