"""Checks an MoE layer in a CUDA graph on each rank. The graph captures forward and backward with exchanges of fixed sizes
once, and is replayed for other tokens with other expert choices. With `rehearse` (a trial on the CPU) no graph is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.static import StaticDispatcher
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.static_storage import on_device
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.layer import MoELayer
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertPlacement
from research.gpu_bench.ceilings import seconds_of
from tools.gpu_check.kernels import difference
from tools.gpu_check.layers import MOST, make_layer, passes, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.process import on_ranks

REPLAYS = 3
TIMES = 20  # number of timed passes; fixed, because all ranks must run the same number


def captured(run: Callable[[], list[Tensor]], job: CheckJob) -> Callable[[], list[Tensor]]:
    """Returns a function that replays a CUDA graph of `run`, and returns the same tensor objects each time."""
    if job.rehearse:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # allocates tables and gradients, and compiles kernels
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    # During the capture, forbidden calls are errors only in this thread: NCCL's thread queries events, and may do so.
    with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
        out = run()

    def replay() -> list[Tensor]:
        recorded.replay()
        return out

    return replay


def graph(job: CheckJob) -> list[Reading]:
    """Compares the replayed layer with a layer that reads the split sizes on the host. Measures the largest relative
    difference over all ranks and replays, and the times of both layers."""
    found = on_ranks(_replayed, job)
    worst, read, replayed = (max(each[place] for each in found) for place in range(3))
    return [
        Reading("difference from sizes read on the host", worst, most=MOST["fp32" if job.rehearse else "bf16"]),
        job.timed("forward and backward, sizes read", read * 1e3, "ms"),
        job.timed("forward and backward, a graph", replayed * 1e3, "ms"),
    ]


def _replayed(job: CheckJob, mesh: Mesh) -> tuple[float, float, float]:
    device, dtype = mesh.device, torch.float32 if job.rehearse else torch.bfloat16
    tokens, hidden, ffn = (12, 16, 8) if job.rehearse else (4096, 1024, 768)
    groups = single_group(8 * mesh.world_size, 4 * mesh.world_size, 3, ffn)
    known = make_layer(hidden, groups, kernels=triton_or_none(device, dtype) or TORCH, mesh=mesh).to(device)
    fixed = static_layer(known, hidden, groups, tokens, mesh).to(device)
    draw = torch.Generator().manual_seed(4 + mesh.rank)
    inputs = [torch.randn(tokens, hidden, generator=draw).to(device, dtype) for _ in range(2 if job.rehearse else REPLAYS)]
    group_T = torch.zeros(tokens, dtype=torch.int64, device=device)
    x_TD, kept_T, direction_TD = inputs[0].clone(), group_T.clone(), torch.ones_like(inputs[0])
    replay = captured(lambda: passes(fixed, x_TD, kept_T, direction_TD), job)
    worst = 0.0
    for nth, each in enumerate(inputs):
        group_T[: nth * tokens // len(inputs)] = -1  # the number of padding tokens grows from 0 on
        x_TD.copy_(each)
        kept_T.copy_(group_T)
        exact = passes(known, each, group_T, direction_TD)
        worst = max([worst, *map(difference, replay(), exact)])
    read, replayed = (
        seconds_of(job, run, times=TIMES) for run in (lambda: passes(known, x_TD, kept_T, direction_TD), replay)
    )
    return worst, read, replayed


def static_layer(like: MoELayer, hidden: int, groups: Any, tokens: int, mesh: Mesh | None = None) -> MoELayer:
    """Makes a layer with exchanges of fixed sizes, and with the router, weights and kernels of `like`."""
    rank, ranks = (0, 1) if mesh is None else (mesh.rank, mesh.world_size)
    placement, kernels = ExpertPlacement.interleaved(groups, ranks), like.experts.kernels
    local = [len(placement.local_experts(rank, group)) for group in groups]
    experts = Experts(hidden, groups, local, storage=on_device, kernels=kernels)
    experts.load_state_dict(like.experts.state_dict())
    wire = AllToAll(mesh.ep if mesh is not None and ranks > 1 else None, CommStats())
    dispatcher = StaticDispatcher(DispatchContext(placement, wire, kernels=kernels, tokens=tokens), room=1.5)
    return MoELayer(norm=like.norm, router=like.router, experts=experts, dispatcher=dispatcher)
