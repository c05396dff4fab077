"""Finds copies of a tensor that are no longer equal. Ranks with the same data (`LocalShard.copies`) compute the same
updates, so even one differing bit means broken hardware or a bug.

The checksum c of a tensor is the sum of its elements' bit patterns, read as integers. For each tensor with copies 0 to
n - 1, one all-reduce computes

    sum over p = 1 .. n - 1 of (2 p + 1) (c_0 - c_p)  mod 2^64

which is 0 if all copies are equal. If a single copy differs, the sum is not 0: an odd factor maps no other number to 0. The
factors of c_0 add up to n^2 - 1.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dist.checkpoint.state import CheckpointState, LocalShard
from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import CHECKSUMS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.optim.optimizer import local

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unequal_copies(
    state: CheckpointState, world: dist.ProcessGroup, device: torch.device, tracker: CollectiveTracker | None = None
) -> tuple[list[str], list[int]]:
    """Returns the names of the tensors whose copies differ. Also returns the ranks whose copy of the first such tensor
    differs from the majority; if there is no majority, all ranks with a copy. The result is equal on all ranks.

    Collective. Costs one pass over the tensors, an all-reduce of 8 bytes for each tensor of model and optimizer, and a host
    sync. If copies differ, a second all-reduce and host sync follow.
    """
    names = sorted(state.specs)
    sums = {name: _checksum(held).to(device) for name, held in state.held.items() if held.copies > 1}
    zero = torch.zeros((), dtype=torch.int64, device=device)
    parts = [sums[name] * _factor(state.held[name]) if name in sums else zero for name in names]
    totals = sum_over(torch.stack(parts), world, name=CHECKSUMS, tracker=tracker).tolist()
    unequal = [name for name, total in zip(names, totals, strict=True) if total]
    if not unequal:
        return [], []
    of_ranks_W3 = torch.zeros(dist.get_world_size(world), 3, dtype=torch.int64, device=device)
    if (name := unequal[0]) in sums:
        of_ranks_W3[dist.get_rank(world)] = torch.tensor([1, _begin(state.held[name].tensor), int(sums[name])])
    return unequal, _different(sum_over(of_ranks_W3, world, name=CHECKSUMS, tracker=tracker).tolist())


def _checksum(held: LocalShard) -> Tensor:
    flat = local(held.tensor).detach().reshape(-1)
    return flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64)


def _factor(held: LocalShard) -> int:
    return -(2 * held.position + 1) if held.position else held.copies**2 - 1


def _different(of_ranks: list[list[int]]) -> list[int]:
    """Returns the ranks whose checksum differs from the majority of ranks with the same shard. Gets three numbers of each
    rank: 1 if it has a copy, the position of its shard, and its checksum."""
    ranks = [rank for rank, (has, _, _) in enumerate(of_ranks) if has]
    shards = Counter(of_ranks[rank][1] for rank in ranks)
    values = Counter(tuple(of_ranks[rank]) for rank in ranks)
    return [rank for rank in ranks if 2 * values[tuple(of_ranks[rank])] <= shards[of_ranks[rank][1]]]


def _begin(tensor: Tensor) -> int:
    """Returns the index of a shard's first element in the whole tensor, in row-major order."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(index * stride for index, stride in zip(offset, tensor.stride(), strict=True))
