"""Optimizer state and gradient reduction that router tuning saves on one rank."""

from typing import NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor

from moe_dist.optim.optimizer import MOMENTS
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.roles import Role


class Savings(NamedTuple):
    """Numbers and bytes on one rank; each as a pair, for trained and for all parameters.

    Attributes:
        parameters: Count.
        optimizer: Bytes of the moments.
        reduced: Bytes of gradients that enter a reduction each step; under FSDP2 whole gradients, reduced to shards.
    """

    parameters: tuple[int, int]
    optimizer: tuple[int, int]
    reduced: tuple[int, int]

    def __str__(self) -> str:
        parts = zip(("parameters", "bytes of optimizer state", "bytes of gradients to reduce a step"), self, strict=True)
        return ", ".join(f"{moving:,} of {every:,} {what}" for what, (moving, every) in parts)


def savings(parallel: ParallelModel) -> Savings:
    """Counts the parameters of this rank."""
    sums = [[0, 0], [0, 0], [0, 0]]
    for info in parallel.parameters:
        here, whole = _local(info.parameter), info.parameter.numel() * info.parameter.element_size()
        shared = parallel.mesh.edp_size if info.role is Role.EXPERT else parallel.mesh.world_size
        counts = (here, len(MOMENTS) * here * info.parameter.element_size(), whole if shared > 1 else 0)
        for total, count in zip(sums, counts, strict=True):
            total[0] += count * info.parameter.requires_grad
            total[1] += count
    return Savings(*((moving, every) for moving, every in sums))


def _local(parameter: nn.Parameter) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
