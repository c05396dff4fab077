"""Measures the GPU's rates. Also measures the times of layers, and compares them with the least times that the rates allow.

Shape letters: T tokens, Q = T K (token, expert) pairs, D hidden size, F hidden width of experts, E experts, K choices of a
token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from tools.gpu_check.layers import make_layer, passes, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.profiled import profiled

BF16 = 2  # bytes
TIMED_SECONDS = 0.5  # seconds for which each measurement is repeated
SHAPE = {"T": 8192, "D": 2048, "F": 1024, "E": 64, "K": 8}  # OLMoE-1B-7B, two sequences
# T, D, F, E and K of other models. If E counts the experts of one rank, T counts the tokens that reach them.
SHAPES = {
    "Mixtral": (8192, 4096, 14336, 8, 2),
    "DeepSeek-V3, 32 of 256 experts": (16_384, 7168, 2048, 32, 2),
    "MoMa, a group": (16_384, 2048, 5440, 4, 1),
    "OLMoE, 32,768 tokens": (32_768, 2048, 1024, 64, 8),
}
TINY = {"T": 16, "D": 16, "F": 8, "E": 4, "K": 2}
H100 = {"copy": 2.7e12, "gemm": 700e12}  # limits: about 0.8 and 0.7 of the data sheet's 3.35e12 B/s and 989e12 FLOP/s


def seconds_of(job: CheckJob, run: Callable[[], Any], *, times: int = 0) -> float:
    """Returns the median seconds of a call of `run`. On CUDA torch's timer queues many calls between two syncs, so that
    launches overlap with kernels. With `rehearse`, times one call. If `run` has collectives, `times` must be set: all
    ranks then call it `times` times, and the result is the mean."""
    timer = Timer("run()", globals={"run": run})
    if job.rehearse:
        return timer.timeit(1).median
    run()  # compiles before the timer's first call, whose time sets the number of queued calls
    return timer.timeit(times).mean if times else timer.blocked_autorange(min_run_time=TIMED_SECONDS).median


def sizes(job: CheckJob) -> tuple[int, ...]:
    """Returns T, D, F, E and K of OLMoE. With `rehearse`, returns tiny numbers."""
    return tuple((TINY if job.rehearse else SHAPE).values())


def drawn(job: CheckJob, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Draws normal values on the job's device."""
    return torch.randn(*shape, device=job.device, dtype=dtype)


def ceilings(job: CheckJob) -> list[Reading]:
    """Measures the rates with which other checks compare: bytes/s of a copy (read and written), and bf16 FLOP/s."""
    count, width = (1 << 10, 32) if job.rehearse else (1 << 29, 8192)
    source = drawn(job, count)
    target, x = torch.empty_like(source), drawn(job, width, width)
    bars = H100 if "H100 80GB HBM3" in job.card else {}  # no limits for H100 PCIe and NVL
    copy = 2 * BF16 * count / seconds_of(job, lambda: target.copy_(source))
    gemm = 2 * width**3 / seconds_of(job, lambda: x @ x)
    small = torch.zeros(1, device=job.device)
    launch = seconds_of(job, lambda: [small.add_(1) for _ in range(100)]) / 100
    readings = [
        job.timed("copy", copy, "B/s", least=bars.get("copy", 0.0)),
        job.timed("gemm", gemm, "FLOP/s", least=bars.get("gemm", 0.0)),
        job.timed("a launch", launch * 1e6, "us"),
    ]
    if not job.rehearse:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        up = host.to("cuda")
        rate = host.numel() / seconds_of(job, lambda: up.copy_(host, non_blocking=True))
        readings.append(job.timed("copy from the host", rate, "B/s"))
    return readings


def layer_rate(job: CheckJob) -> list[Reading]:
    """Times forward and backward of one layer on one rank, in the shapes of four models. The least time has two parts:
    the time of the matrix products at the rate of dense products, and the time of reading and writing the bytes of
    gathers, SwiGLU and sums at the rate of copies.
    """
    gemm, copy, device, readings = job.rate("gemm"), job.rate("copy"), torch.device(job.device), []
    for name, (T, D, F, E, K) in {"OLMoE": sizes(job), **({} if job.rehearse else SHAPES)}.items():
        ours, Q = bf16_layer(D, single_group(E, 0, K, F), device), T * K
        x_TD, group_T = drawn(job, T, D), torch.zeros(T, dtype=torch.int64, device=device)
        pairs = ours.router(x_TD, group_T)[0]

        def run(ours: MoELayer = ours, x_TD: torch.Tensor = x_TD, group_T: torch.Tensor = group_T) -> Any:
            return passes(ours, x_TD, group_T, x_TD)

        router = seconds_of(job, lambda ours=ours, x_TD=x_TD, group_T=group_T: ours.router(x_TD, group_T))
        plan = seconds_of(job, lambda ours=ours, pairs=pairs, T=T: ours.dispatcher.plan(pairs, T))
        seconds = seconds_of(job, run)
        forward = D * (T + Q) + 3 * Q * F + D * (Q + T)  # elements read and written by gather, SwiGLU and sum
        backward = D * (T + Q) + 5 * Q * F + D * (2 * Q + T)  # the sum also reads the rows of the gradients of gate and up
        flops = 3 * 3 * 2 * Q * D * F  # gate, up, down: 1 product in forward, 2 in backward
        least = flops / gemm + BF16 * (forward + backward) / copy
        readings += [
            job.timed(f"{name}: router", router * 1e3, "ms"),
            job.timed(f"{name}: plan", plan * 1e3, "ms"),
            Reading(f"{name}: kernels of forward and backward", profiled(job, run).launches),
            job.timed(f"{name}: forward and backward", seconds * 1e3, "ms"),
            job.timed(f"{name}: its least time", least * 1e3, "ms"),
            job.timed(f"{name}: seconds / least", seconds / least, most=1.25),
        ]
    return readings


def bf16_layer(hidden: int, groups: Any, device: torch.device) -> MoELayer:
    """Makes a layer with bf16 experts, like a training step that keeps bf16 copies of the weights."""
    made = make_layer(hidden, groups, kernels=triton_or_none(device, torch.bfloat16) or TORCH, made_on=device)
    made.experts.to(torch.bfloat16)
    return made
