"""Times the contenders in turn on all ranks, and counts the data that each rank passes to collectives."""

import gc
import math
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

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effort:
    """The numbers of rounds of a measurement, and its seed."""

    rounds: int = 20  # timed rounds; each runs every contender once
    warmup: int = 3  # untimed rounds before the timed rounds
    seed: int = 0  # seed of routing, rows, and order of contenders in a round


@dataclass(frozen=True)
class Sent:
    """The data that all ranks send in one run of a contender; `calls` counts the collectives of one rank."""

    rows: int  # token rows (hidden states)
    payload_bytes: int  # bytes of the token rows
    other_bytes: int
    calls: int


@dataclass(frozen=True)
class Interval:
    """A median, and an interval that contains the true median with a probability of at least CONFIDENCE."""

    median: float
    low: float
    high: float
    n: int


def median_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Returns the median of independent values, and its interval by the sign test. Two of the values are its ends.

    The interval assumes nothing about the distribution of times. The true median lies below the l-th smallest value only if
    fewer than l of n values are below the median, which has probability P(Binomial(n, 1/2) < l). The true median lies above
    the l-th largest value with the same probability. The interval goes from the l-th smallest to the l-th largest value. l
    is the largest number for which the two probabilities sum to at most 1 - CONFIDENCE. With fewer than 6 values there is
    no such l, and the interval spans all values.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("no values: a median needs one at least")
    outside, rank = 0.0, 0
    while 2 * (outside + math.comb(n, rank) / 2**n) <= 1 - CONFIDENCE:
        outside += math.comb(n, rank) / 2**n
        rank += 1
    low = max(rank, 1) - 1
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[n - 1 - low]), n)


def paired_ratio(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> Interval:
    """Returns the median of the ratios (our time / their time), with its interval. The two times of a ratio are from the
    same round. A disturbance of the machine slows both times and therefore mostly cancels in their ratio."""
    ours_n, theirs_n = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours_n.shape != theirs_n.shape:
        raise ValueError(f"{ours_n.size} values cannot be paired with {theirs_n.size}")
    return median_interval(ours_n / theirs_n)


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the least-squares slope of log y over log x, which is 1 if y is proportional to x."""
    return float(np.polyfit(np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64)), 1)[0])


def time_interleaved(contenders: Mapping[str, Callable[[], Any]], mesh: Mesh, effort: Effort) -> dict[str, np.ndarray]:
    """Returns the seconds that each contender takes on the slowest rank, in each timed round.

    Each round runs every contender once, with a barrier before each run. The order of contenders is random in each round,
    so that a periodic disturbance of the machine does not always affect the same contender. It is equal on all ranks.
    """
    names = list(contenders)
    rng = np.random.default_rng(effort.seed)
    seconds = torch.zeros(effort.rounds, len(names), dtype=torch.float64)
    gc.collect()
    gc.disable()  # garbage collection would slow a random contender by milliseconds
    try:
        for number in range(-effort.warmup, effort.rounds):
            for index in rng.permutation(len(names)).tolist():
                dist.barrier(mesh.world)
                begin = time.perf_counter()
                result = contenders[names[index]]()
                taken = time.perf_counter() - begin
                del result  # the result is freed outside the timed part
                if number >= 0:
                    seconds[number, index] = taken
    finally:
        gc.enable()
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=mesh.world)  # a single collective, after all timed rounds
    return {name: seconds[:, index].numpy() for index, name in enumerate(names)}


def count_sent(run: Callable[[], Any], mesh: Mesh, *, hidden: int) -> Sent:
    """Runs a contender once, and counts the data that it passes to all_to_all_single. Data that a rank sends to itself are
    not counted."""
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
    """Times all contenders at a point, counts the data that they send, and compares the times of the two contenders in each
    of `pairs`. The result is equal on all ranks."""
    sent = {name: asdict(count_sent(run, mesh, hidden=hidden)) for name, run in contenders.items()}
    seconds = time_interleaved(contenders, mesh, effort)
    return {
        "point": dict(point),
        "milliseconds": {name: asdict(median_interval(each * 1e3)) for name, each in seconds.items()},
        "ratio": {f"{mine} / {other}": asdict(paired_ratio(seconds[mine], seconds[other])) for mine, other in pairs},
        "sent": sent,
    }
