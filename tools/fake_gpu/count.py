"""Counts kernels, bytes, FLOPs, host syncs, collectives and memory of a training step by part of the model and phase,
without a GPU."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.bundled import find_config
from moe_dist.errors import ConfigError
from tools.fake_gpu.fake_cuda import Work, child
from tools.fake_gpu.fake_step import MICRO_BATCHES, Counted

Key = tuple[str, str]  # part and phase


def count(path: str | Path, ranks: int, overrides: Sequence[str] = (), *, rank: int = 0) -> Counted:
    """Counts one step of a configuration on one of `ranks` ranks. Counting takes some seconds, in a separate process.

    Raises:
        ConfigError: the configuration is refused, or the step failed. The message has the reason or the last lines of
            output.
        ResourceError: from `fake_cuda.preloaded`.
    """
    done = child("tools.fake_gpu.fake_step", [str(find_config(path).resolve()), str(rank), str(ranks), *overrides])
    if done.returncode:
        raise ConfigError(f"{path}: {done.stderr.strip()[-1500:]}")
    return Counted(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Share:
    """Counts that each micro-batch adds to a step, and counts that do not depend on the number of micro-batches; by part
    and phase."""

    micro_batch: Counter[Key]
    once: Counter[Key]


def kernels(counted: Counted) -> Share:
    """Returns the numbers of kernels."""
    return _share(counted, lambda work: 1)


def num_bytes(counted: Counted) -> Share:
    """Returns the bytes that kernels read and write."""
    return _share(counted, lambda work: work.num_bytes)


def flops_of(counted: Counted) -> Share:
    """Returns the FLOPs of the kernels."""
    return _share(counted, lambda work: work.flops)


def _share(counted: Counted, value: Callable[[Work], int]) -> Share:
    found = Share(Counter(), Counter())
    for listed, number_of in ((counted.more_work, found.micro_batch), (counted.work, found.once)):
        for *key, number in listed:
            work = Work(*key)
            number_of[work.part, work.phase] += number * value(work)
    for key, number in found.micro_batch.items():
        found.once[key] -= MICRO_BATCHES * number
    return found
