"""What routers are told of a training micro-batch on all ranks, summed up in the one reduction before the first forward.

Shape letters: W ranks of the world, I micro-batches of a rank and step, G expert groups.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.collectives import CommStats
from moe_dist.data.batch import Batch
from moe_dist.moe.routing import GlobalBatchInfo
from moe_dist.parallel.mesh import Mesh


def count_members(
    batches: Sequence[Batch], group_of_modality: Tensor, mesh: Mesh, num_groups: int, *, asked: bool
) -> Tensor:
    """This rank's tokens of each micro-batch and group in its row, zeros in the others', so that a sum over the ranks tells
    all of them: float64 [W, I, G]; with I = 0 where no router asks."""
    num_batches = len(batches) if asked else 0
    members_WIG = torch.zeros((mesh.world_size, num_batches, num_groups), dtype=torch.float64, device=mesh.device)
    groups = torch.arange(num_groups, device=mesh.device)
    for i in range(num_batches):
        group_BS = torch.where(batches[i].padding_BS, -1, group_of_modality[batches[i].modality_BS])
        members_WIG[mesh.rank, i] = (group_BS.flatten()[:, None] == groups).sum(0)
    return members_WIG


def batch_info_of(
    batches: Sequence[Batch], members_WIG: Tensor, mesh: Mesh, step: int, comm_stats: CommStats
) -> list[GlobalBatchInfo | None]:
    """The facts of each micro-batch from the sums over all ranks; None where no router asked.

    Syncs with the host where one did: these are the sizes of all that layers then exchange without a sync of their own.
    Every rank's i-th micro-batch has the same shape.
    """
    if not members_WIG.numel():
        return [None] * len(batches)
    flat = comm_stats.to_host("tokens of each rank and group", members_WIG.to(torch.int64).flatten())
    counts_WIG, batch_info, first = np.array(flat).reshape(members_WIG.shape), [], 0
    for i, batch in enumerate(batches):
        length = batch.tokens_BS.numel()
        batch_info.append(
            GlobalBatchInfo(
                step=step,
                first_token=first,
                rank=mesh.rank,
                tokens_W=(length,) * mesh.world_size,
                members_WG=tuple(tuple(row) for row in counts_WIG[:, i].tolist()),
            )
        )
        first += length * mesh.world_size
    return batch_info
