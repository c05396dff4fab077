"""An MoE layer in a CUDA graph: forward and backward with exchanges of fixed sizes, captured once and replayed for tokens
with other routings. A rehearsal runs the same passes without a graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.rows import TORCH
from moe_dist.moe.dispatch.static import StaticDispatcher
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.static_experts import StaticExperts
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build_dispatch import room_for
from tools.gpu_check.kernels import difference
from tools.gpu_check.layers import MOST, make_layer, passes, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.rates import seconds_of

ROOM = 1.5  # the default of parallel.dispatch.room
REPLAYS = 3


def static_layer(like: MoELayer, hidden: int, groups: Any, tokens: int, kernels: RowKernels) -> MoELayer:
    """A layer with exchanges of fixed sizes, and with the router and the weights of `like`."""
    placement = ExpertPlacement.interleaved(groups, 1)
    experts = StaticExperts(hidden, groups, [group.num_experts for group in groups], kernels=kernels)
    experts.load_state_dict(like.experts.state_dict())
    room = room_for(placement, tokens, room=ROOM)
    dispatcher = StaticDispatcher(placement, AllToAll(None, CommStats()), room=room, kernels=kernels)
    return MoELayer(norm=like.norm, router=like.router, experts=experts, dispatcher=dispatcher)


def captured(run: Callable[[], list[Tensor]], job: CheckJob) -> Callable[[], list[Tensor]]:
    """Returns a function that replays a graph of `run`, and returns the same tensors each time."""
    if job.rehearse:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # makes tables and gradients' buffers, and compiles kernels
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        out = run()

    def replay() -> list[Tensor]:
        recorded.replay()
        return out

    return replay


def graph(job: CheckJob) -> list[Reading]:
    """The largest relative difference from the layer that reads its sizes, over several replays; and the times of both."""
    device, dtype = torch.device(job.device), torch.float32 if job.rehearse else torch.bfloat16
    tokens, hidden, ffn = (48, 32, 24) if job.rehearse else (4096, 1024, 768)
    groups = single_group(8, 4, 3, ffn)
    known = make_layer(hidden, groups, kernels=triton_or_none(device, dtype) or TORCH).to(device)
    fixed = static_layer(known, hidden, groups, tokens, known.experts.kernels).to(device)
    draw = torch.Generator().manual_seed(4)
    inputs = [torch.randn(tokens, hidden, generator=draw).to(device, dtype) for _ in range(REPLAYS)]
    group_T = torch.zeros(tokens, dtype=torch.int64, device=device)
    x_TD, kept_T, direction_TD = inputs[0].clone(), group_T.clone(), torch.ones_like(inputs[0])
    replay = captured(lambda: passes(fixed, x_TD, kept_T, direction_TD), job)
    worst = 0.0
    for nth, each in enumerate(inputs):
        group_T[: nth * tokens // REPLAYS] = -1  # padding: nothing the first time, then ever more
        x_TD.copy_(each)
        kept_T.copy_(group_T)
        exact = passes(known, each, group_T, direction_TD)
        worst = max([worst, *map(difference, replay(), exact)])
    read = seconds_of(job, lambda: passes(known, x_TD, kept_T, direction_TD))
    return [
        Reading("difference from sizes read on the host", worst, most=MOST["fp32" if job.rehearse else "bf16"]),
        job.timed("forward and backward, sizes read", read * 1e3, "ms"),
        job.timed("forward and backward, a graph", seconds_of(job, replay) * 1e3, "ms"),
    ]
