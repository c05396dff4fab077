"""Interleaved timing on all ranks, and counting of the data that each rank sends, at the call of the collective."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.mesh import Mesh
from tools.bench.statistics import median_interval, paired_ratio


@dataclass(frozen=True)
class Effort:
    """Effort of a measurement.

    Attributes:
        rounds: Timed rounds; each runs every contender once.
        warmup: Untimed rounds before them.
        seed: For routings, rows and the order inside a round.
    """

    rounds: int = 20
    warmup: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Sent:
    """Sent by all ranks in one run of a contender: hidden rows and their bytes, other bytes, and calls of one rank."""

    rows: int
    payload_bytes: int
    other_bytes: int
    calls: int


def time_interleaved(contenders: Mapping[str, Callable[[], Any]], mesh: Mesh, effort: Effort) -> dict[str, np.ndarray]:
    """Seconds of each contender in each timed round, on the slowest rank.

    Each round runs all contenders once, in a new random order that is the same on all ranks, with a barrier before each. So
    a disturbance of the machine affects all of them. Python's garbage collector does not run meanwhile.
    """
    names = list(contenders)
    rng = np.random.default_rng(effort.seed)
    seconds = torch.zeros(effort.rounds, len(names), dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        for number in range(-effort.warmup, effort.rounds):
            for index in rng.permutation(len(names)).tolist():
                dist.barrier(mesh.world)
                begin = time.perf_counter()
                result = contenders[names[index]]()
                taken = time.perf_counter() - begin
                del result
                if number >= 0:
                    seconds[number, index] = taken
    finally:
        gc.enable()
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=mesh.world)
    return {name: seconds[:, index].numpy() for index, name in enumerate(names)}


def count_sent(run: Callable[[], Any], mesh: Mesh, *, hidden: int) -> Sent:
    """One run, counted at the calls of all_to_all_single; a rank's slice for itself is not counted."""
    counts = np.zeros(4, dtype=np.int64)
    original = dist.all_to_all_single

    def counted(
        output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any
    ) -> Any:
        items, send = input, input_split_sizes
        per_rank = [items.shape[0] // mesh.ep_size] * mesh.ep_size if send is None else [int(each) for each in send]
        remote = sum(per_rank) - per_rank[mesh.ep_rank]
        row_bytes = items.element_size() * (items.numel() // items.shape[0] if items.shape[0] else 0)
        is_payload = items.dim() == 2 and items.shape[1] == hidden
        counts[:] += [remote * is_payload, remote * row_bytes * is_payload, remote * row_bytes * (not is_payload), 1]
        return original(output, input, output_split_sizes, input_split_sizes, **rest)

    with mock.patch.object(dist, "all_to_all_single", counted):
        run()
    total = torch.from_numpy(counts.copy())
    dist.all_reduce(total, group=mesh.world)
    rows, payload, other, calls = total.tolist()
    return Sent(rows, payload, other, calls // mesh.world_size)


def measured_row(
    contenders: Mapping[str, Callable[[], Any]],
    mesh: Mesh,
    effort: Effort,
    *,
    hidden: int,
    point: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Counts and times of all contenders at a point, and the paired ratio of each of `pairs`; the same on all ranks."""
    sent = {name: asdict(count_sent(run, mesh, hidden=hidden)) for name, run in contenders.items()}
    seconds = time_interleaved(contenders, mesh, effort)
    return {
        "point": dict(point),
        "milliseconds": {name: median_interval(each * 1e3).to_json() for name, each in seconds.items()},
        "ratio": {f"{mine} / {other}": paired_ratio(seconds[mine], seconds[other]).to_json() for mine, other in pairs},
        "sent": sent,
    }
