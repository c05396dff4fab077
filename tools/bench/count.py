"""Kernels, host syncs and collectives of a training step by part of the model and phase, counted without a GPU."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moe_dist.config.bundled import find_config
from moe_dist.errors import ConfigError
from tools.bench.fake_cuda import child
from tools.bench.fake_step import MICRO_BATCHES, Counted


def count(path: str | Path, ranks: int, overrides: Sequence[str] = (), *, rank: int = 0) -> Counted:
    """Counts one step of a configuration on one of `ranks` ranks. Takes some seconds, in a process of its own.

    Raises:
        ConfigError: the configuration is refused, or the step failed; has the reason, or the last lines of the error.
        ResourceError: from `fake_cuda.preloaded`.
    """
    done = child("tools.bench.fake_step", [str(find_config(path).resolve()), str(rank), str(ranks), *overrides])
    if done.returncode:
        raise ConfigError(f"{path}: {done.stderr.strip()[-1500:]}")
    return Counted(**json.loads(done.stdout.splitlines()[-1]))


def table(counted: Counted) -> Table:
    """The counts per micro-batch, and of the rest of the step; attention and MoE layers per layer."""
    made = Table(title=f"{counted.config}: rank {counted.rank} of {counted.ranks}, {counted.layers['attention']} layers")
    for column in ("part", "phase", "kernels", "GB read and written", "collectives"):
        made.add_column(column, justify="left" if column in ("part", "phase", "collectives") else "right")
    for key, kernels in counted.kernels.items():
        part, phase = key.split()
        layers = counted.layers.get(part)
        times = (MICRO_BATCHES if phase != "step" else 1) * (layers or 1)
        collectives = {
            name.split()[2]: number / times for name, number in counted.collectives.items() if name.startswith(f"{key} ")
        }
        label = f"{part}, a layer" if layers else part
        text = ", ".join(f"{number:g} {name.strip('_')}" for name, number in collectives.items())
        made.add_row(label, phase, f"{kernels / times:.0f}", f"{counted.num_bytes[key] / times / 1e9:.2f}", text)
    for name, noted in (("host waits for a value", counted.syncs), ("host waits for a copy", counted.copies)):
        made.add_section()
        for key, number in noted.items():
            made.add_row(name, key.partition(" ")[0], f"{number}", "", key.partition(" ")[2] + ", a step")
    return made
