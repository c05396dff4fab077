"""Checks the dispatchers that call other projects' kernels, on several ranks of one machine."""

import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.config.bundled import find_config
from moe_dist.config.load import load_config
from moe_dist.config.parallel.section import ParallelSection
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.own_model import build_moe_layer
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.host import installed
from moe_dist.train.build.dispatch import dispatch_context
from tools.gpu_check.kernels import difference
from tools.gpu_check.layers import CONFIG, MOST, passes, single_group
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks

HIDDEN, TOKENS = 512, 256  # sizes of the layers that run kernels of other libraries


def deep_ep(job: CheckJob) -> list[Reading]:
    return _check(job, "deep_ep_v2")


def hybrid_ep(job: CheckJob) -> list[Reading]:
    return _check(job, "hybrid_ep")


def _section(kind: str, ranks: int) -> ParallelSection:
    return load_config(find_config(CONFIG), [f"parallel.ep={ranks}", f"parallel.dispatch={{kind: {kind}}}"]).parallel


def _check(job: CheckJob, kind: str) -> list[Reading]:
    dispatch = _section(kind, max(2, job.gpus)).dispatch
    missing = [name for name in dispatch.needs_modules if not installed(name)]
    if missing:
        raise NotPossibleError(f"the package {' and '.join(missing)} is not installed; build {dispatch.source}")
    if job.rehearse or job.gpus < 2:
        raise NotPossibleError(f"{dispatch.name} needs two GPUs")
    found = on_ranks(_compare, job, kind, world=job.gpus)
    return [Reading(f"{name}: difference", max(each[name] for each in found), most=MOST["bf16"]) for name in found[0]]


def _compare(job: CheckJob, mesh: Mesh, kind: str) -> dict[str, float]:
    """Compares a layer in bf16 with the library's dispatch, and a layer in float64 with `all_to_all`. Returns the
    relative differences of the output, and of the gradients of input and weights. A quarter of the choices are null."""
    groups = single_group(3 * mesh.world_size, mesh.world_size, 4, 256)
    placement = ExpertPlacement.interleaved(groups, mesh.world_size)
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    found = []
    for each, dtype in (("all_to_all", torch.float64), (kind, torch.bfloat16)):
        layer = build_moe_layer(HIDDEN, groups, ep_group=mesh.ep, placement=placement, std=HIDDEN**-0.5)
        section = _section(each, mesh.world_size)
        context = dispatch_context(section, placement, AllToAll(mesh.ep, CommStats()), HIDDEN)
        layer.dispatcher = section.dispatch.build(context)
        layer = (layer.double() if dtype == torch.float64 else layer).to(mesh.device)
        group_T = torch.zeros(TOKENS, dtype=torch.int64, device=mesh.device)
        found.append(passes(layer, x_TD.to(mesh.device, dtype), group_T))
    names = ("output", "gradient of the input", *(f"gradient {i} of the weights" for i in range(len(found[0]) - 2)))
    return {name: difference(ours, exact) for name, exact, ours in zip(names, *found, strict=True)}
