"""Counts the kernels, bytes, FLOPs, syncs, collectives and memory of each part of the model in one step, without a GPU."""

import json
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.bundled import find_config
from moe_dist.errors import ConfigError
from research.fake_gpu.fake_cuda import child
from research.fake_gpu.fake_step import Counted


def count(path: str | Path, ranks: int, overrides: Sequence[str] = (), *, rank: int = 0) -> Counted:
    """Counts one step of a configuration on one of `ranks` ranks. Counting takes some seconds, in a separate process.

    Raises:
        ConfigError: the configuration is invalid, or the step failed. The message has the reason, or the end of the output.
        ResourceError: from `fake_cuda.preloaded`.
    """
    done = child("research.fake_gpu.fake_step", [str(find_config(path).resolve()), str(rank), str(ranks), *overrides])
    if done.returncode:
        raise ConfigError(f"{path}: {done.stderr.strip()[-1500:]}")
    return Counted(**json.loads(done.stdout.splitlines()[-1]))
