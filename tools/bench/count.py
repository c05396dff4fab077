"""Kernels, bytes, FLOPs, host syncs and collectives of a training step by part of the model and phase, counted without a
GPU, beside the least possible."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moe_dist.config.bundled import find_config
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import layout_without_data
from tools.bench.card_time import card_rates, card_time
from tools.bench.card_time import table as time_table
from tools.bench.fake_cuda import Work, child
from tools.bench.fake_step import MICRO_BATCHES, Counted, scaled
from tools.bench.least import Key, least_bytes, least_flops


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


def leasts(counted: Counted, path: str | Path, overrides: Sequence[str]) -> tuple[dict[Key, float], dict[Key, float]]:
    """The fewest bytes and FLOPs of the counted configuration, by part and phase, of one micro-batch; none for a model with
    LoRA, shared experts or mixture of depths, of which `least` knows nothing."""
    config = scaled(overrides, str(find_config(path)), counted.ranks)
    if config.model.has_adapters or config.model.moe.shared_ffn_dim or config.model.depth_layers:
        return {}, {}
    layout = layout_without_data(config)
    return least_bytes(config, layout, counted.rank), least_flops(config, layout)


def table(counted: Counted, leasts: tuple[dict[Key, float], dict[Key, float]] = ({}, {})) -> Table:
    """The counts per micro-batch, and of the rest of the step; attention and MoE layers per layer.

    Args:
        leasts: The fewest bytes and FLOPs, which stand beside those counted.
    """
    made = Table(title=f"{counted.config}: rank {counted.rank} of {counted.ranks}, {counted.layers['attention']} layers")
    for column in ("part", "phase", "kernels", "GB", "least GB", "TFLOP", "least", "collectives"):
        made.add_column(column, justify="left" if column in ("part", "phase", "collectives") else "right")
    flops: Counter[str] = Counter()
    for *key, number in counted.work:
        work = Work(*key)
        flops[f"{work.part} {work.phase}"] += number * work.flops
    for key, kernels in counted.kernels.items():
        part, phase = key.split()
        layers = counted.layers.get(part)
        times = (MICRO_BATCHES if phase != "step" else 1) * (layers or 1)
        collectives = {
            name.split()[2]: number / times for name, number in counted.collectives.items() if name.startswith(f"{key} ")
        }
        label = f"{part}, a layer" if layers else part
        text = ", ".join(f"{number:g} {name.strip('_')}" for name, number in collectives.items())
        gb, tera = counted.num_bytes[key] / times / 1e9, flops[key] / times / 1e12
        least_gb, least_tera = (
            f"{each[part, phase] / (layers or 1) / unit:.2f}" if (part, phase) in each else ""
            for each, unit in zip(leasts, (1e9, 1e12), strict=True)
        )
        made.add_row(
            label, phase, f"{kernels / times:.0f}", f"{gb:.2f}", least_gb, f"{tera:.2f}" if tera else "", least_tera, text
        )
    for name, noted in (("host waits for a value", counted.syncs), ("host waits for a copy", counted.copies)):
        made.add_section()
        for key, number in noted.items():
            made.add_row(name, key.partition(" ")[0], f"{number}", "", "", "", "", key.partition(" ")[2] + ", a step")
    return made


def report(path: Path, ranks: int, overrides: Sequence[str], *, card: str | None) -> list[Table]:
    """The counts of a step, and with a card the time that its rates make of them.

    Raises:
        ConfigError, ResourceError: from `count`; there are no rates of the card.
    """
    rates = None if card is None else card_rates(card)
    counted = count(path, ranks, overrides)
    tables = [table(counted, leasts(counted, path, overrides))]
    if rates is not None:
        tables.append(time_table(card_time(counted, str(find_config(path)), overrides, rates)))
    return tables
